"""Recordings: their bytes, what is believed of them, how they are made."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.prefetch.models.tensor_formats import TensorLayout
from fusecache.prefetch.profiles.access_profile import (
    MAX_BYTES,
    MAX_RUNS,
    AccessProfile,
    ProfileError,
    ProfileRun,
    id_of_model,
    pack_profile,
    unpack_profile,
)
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.prefetch.profiles.recorder import ProfileRecorder, drop_readahead_blocks
from tests.support.scripted import version

MODEL = "0123456789abcdef" * 2
MIB = 1 << 20


def test_the_bytes_of_format_1() -> None:
    profile = AccessProfile(
        MODEL, MIB, (ProfileRun(0, 0, 1), ProfileRun(1, 300, 428, 1), ProfileRun(0, 5, 6))
    )
    assert pack_profile(profile).hex() == (
        "46434f5244455231"
        "0123456789abcdef0123456789abcdef"
        "00001000"
        "03000000"
        "00000100"
        "02d6048001"
        "01"
        "01cd0601"
        "00"
        "586ea8588d6d0ec5"
    )
    assert unpack_profile(pack_profile(profile)) == profile


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda file, start, count, rank: ProfileRun(file, start, start + count, rank),
            st.integers(0, 200),
            st.integers(0, 1 << 22),
            st.integers(1, 1 << 14),
            st.integers(0, 255),
        )
    )
)
def test_what_is_packed_is_unpacked(runs: list[ProfileRun]) -> None:
    profile = AccessProfile(MODEL, MIB, tuple(runs))
    assert unpack_profile(pack_profile(profile)) == profile


def test_very_many_runs_are_told_more_coarsely_and_none_is_lost() -> None:
    order = [(7919 * n) % 60_000 for n in range(60_000)]
    profile = AccessProfile(MODEL, MIB, tuple(ProfileRun(n % 8, 4 * n, 4 * n + 2) for n in order))
    data = pack_profile(profile)
    assert len(data) <= MAX_BYTES
    told = unpack_profile(data)
    assert len(told.runs) <= MAX_RUNS
    for file in range(8):
        blocks = {block for run in told.ranges_of_file(file) for block in run}
        assert blocks >= {block for run in profile.ranges_of_file(file) for block in run}


def _sealed(body: bytes) -> bytes:
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


HEAD = struct.pack("<8s16sI", b"FCORDER1", bytes(16), MIB)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(100),
        pack_profile(AccessProfile(MODEL, MIB, (ProfileRun(0, 0, 1),)))[:-1],
        b"x" + pack_profile(AccessProfile(MODEL, MIB, (ProfileRun(0, 0, 1),)))[1:],
        _sealed(b"FCORDER2" + bytes(24) + bytes(4)),  # another version
        _sealed(HEAD + struct.pack("<I", 1)),  # truncated
        _sealed(HEAD + struct.pack("<I", 0) + b"\0"),  # too long
        _sealed(HEAD + struct.pack("<I", 1 << 31)),
        _sealed(HEAD + struct.pack("<I", 1) + b"\1\0\1\0"),  # file -1
        _sealed(HEAD + struct.pack("<I", 1) + b"\0\0\0\0"),  # no blocks
        _sealed(HEAD + struct.pack("<I", 1) + b"\0\0" + b"\xff" * 30),
        bytes(MAX_BYTES + 1),
    ],
)
def test_what_is_no_recording(data: bytes) -> None:
    with pytest.raises(ProfileError):
        unpack_profile(data)


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_recording_or_an_error(body: bytes) -> None:
    for data in (body, _sealed(HEAD + body)):
        try:
            unpack_profile(data)
        except ProfileError:
            continue


def test_a_recording_of_other_files_does_not_fit() -> None:
    profile = AccessProfile(MODEL, MIB, (ProfileRun(1, 0, 10),))
    assert profile.matches_model(MODEL, MIB, [5, 10])
    assert not profile.matches_model(MODEL, MIB, [5, 9])
    assert not profile.matches_model(MODEL, MIB, [5])
    assert not profile.matches_model(MODEL, 2 * MIB, [5, 10])
    assert not profile.matches_model(MODEL[::-1], MIB, [5, 10])


def test_another_version_of_a_file_is_another_model() -> None:
    files = [version("a.bin", 10), version("b.bin", 10)]
    assert id_of_model(files) == id_of_model(reversed(files))
    assert (
        len({id_of_model(files), id_of_model(files[:1]), id_of_model([files[0], version("b.bin", 10, "2")])})
        == 3
    )


def test_ranks_that_read_at_the_same_time_take_turns_in_the_recording() -> None:
    recorder = ProfileRecorder(MODEL, MIB, [100, 100], MIB)
    for block in range(100):
        recorder.record_read(0, block, block + 1, 11)
        recorder.record_read(1, block, block + 1, 12)
    profile = recorder.make_profile({})
    assert profile is not None
    assert profile.rank_count == 2
    assert profile.block_count == 200
    assert len(profile.runs) >= 6
    assert {run.file for run in profile.runs[:2]} == {0, 1}
    assert all(run.stop - run.start <= 32 for run in profile.runs)


def test_a_file_read_in_order_is_one_run_though_its_reads_arrive_out_of_order() -> None:
    recorder = ProfileRecorder(MODEL, MIB, [40], MIB)
    for block in (1, 0, 3, 2, *range(4, 40)):
        recorder.record_read(0, block, block + 1, 11)
    profile = recorder.make_profile({})
    assert profile is not None
    assert profile.runs == (ProfileRun(0, 0, 40),)


def test_what_lies_beside_a_tensor_that_was_read_is_left_out() -> None:
    layout = TensorLayout(
        ((0, 1000),), tuple((1000 + n * 20 * MIB, 1000 + (n + 1) * 20 * MIB) for n in range(5))
    )
    recorder = ProfileRecorder(MODEL, MIB, [101], MIB)
    recorder.record_read(0, 0, 1, 11)
    recorder.record_read(0, 38, 63, 11)  # the third tensor, two blocks before it and two behind
    recorder.record_read(0, 90, 95, 11)  # the middle of the last one
    profile = recorder.make_profile({0: layout})
    assert profile is not None
    assert profile.ranges_of_file(0) == [range(1), range(40, 61), range(90, 95)]


def test_a_look_at_the_headers_is_no_load() -> None:
    recorder = ProfileRecorder(MODEL, MIB, [100, 100], MIB)
    for file in (0, 1):
        recorder.record_read(file, 0, 1, 11)
    assert recorder.make_profile({}) is None


def test_a_load_that_did_not_open_all_files_says_nothing_of_what_is_not_read() -> None:
    recorder = ProfileRecorder(MODEL, MIB, [100, 100], MIB)
    recorder.record_read(1, 20, 50, 11)
    profile = recorder.make_profile({})
    assert profile is not None
    assert profile.runs[0] == ProfileRun(1, 20, 50)
    assert profile.block_count == 100


def test_a_file_that_the_kernel_reads_is_read_whole() -> None:
    recorder = ProfileRecorder(MODEL, MIB, [30, 30], MIB)
    recorder.file_opened(1, is_passthrough=True)
    recorder.file_opened(0)
    recorder.record_read(0, 0, 9, 11)
    profile = recorder.make_profile({})
    assert profile is not None
    assert profile.runs == (ProfileRun(1, 0, 30), ProfileRun(0, 0, 9))


def test_edges_of_small_tensors_stay() -> None:
    wanted = bytearray(b"\1" * 10)
    drop_readahead_blocks(
        wanted, TensorLayout((), tuple((n * MIB // 2, (n + 1) * MIB // 2) for n in range(20))), MIB, 3
    )
    assert wanted == bytearray(b"\1" * 10)


def test_the_shelf_keeps_few_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.prefetch.profiles.profile_store.MAX_PROFILES", 3)
    shelf = ProfileStore(tmp_path)
    assert shelf.load_profile(MODEL) is None
    assert shelf.profile_count() == 0
    for number in range(5):
        shelf.save_profile(f"{number:032x}", bytes([number]))
    assert shelf.profile_count() == 3
    shelf.save_profile("../../etc/passwd", b"x")
    shelf.save_profile(MODEL, bytes(MAX_BYTES + 1))
    assert shelf.load_profile("../format") is None
    assert shelf.load_profile(MODEL) is None
    (tmp_path / "orders" / f"{MODEL}.order").write_bytes(bytes(MAX_BYTES + 1))
    assert shelf.load_profile(MODEL) is None


def test_a_shelf_that_can_not_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "orders").write_text("a file is in the way")
    shelf = ProfileStore(tmp_path)
    shelf.save_profile(MODEL, b"x")
    assert shelf.load_profile(MODEL) is None
    assert shelf.profile_count() == 0
