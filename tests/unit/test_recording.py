"""Recordings: their bytes, what is believed of them, how they are made."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.loader.formats import Layout
from fusecache.loader.recorder import Recorder, leave_out_edges
from fusecache.loader.recording import (
    MAX_BYTES,
    MAX_RUNS,
    Recording,
    RecordingError,
    Run,
    model_id,
    pack,
    unpack,
)
from fusecache.store.orders import Orders
from tests.support.scripted import version

MODEL = "0123456789abcdef" * 2
MIB = 1 << 20


def test_the_bytes_of_format_1() -> None:
    recording = Recording(MODEL, MIB, (Run(0, 0, 1), Run(1, 300, 428, 1), Run(0, 5, 6)))
    assert pack(recording).hex() == (
        "46434f5244455231" "0123456789abcdef0123456789abcdef" "00001000" "03000000"
        "00000100" "02d6048001" "01" "01cd0601" "00" "586ea8588d6d0ec5"
    )  # fmt: skip
    assert unpack(pack(recording)) == recording


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda file, start, count, rank: Run(file, start, start + count, rank),
            st.integers(0, 200), st.integers(0, 1 << 22), st.integers(1, 1 << 14), st.integers(0, 255),
        )
    )
)  # fmt: skip
def test_what_is_packed_is_unpacked(runs: list[Run]) -> None:
    recording = Recording(MODEL, MIB, tuple(runs))
    assert unpack(pack(recording)) == recording


def test_very_many_runs_are_told_more_coarsely_and_none_is_lost() -> None:
    order = [(7919 * n) % 60_000 for n in range(60_000)]
    recording = Recording(MODEL, MIB, tuple(Run(n % 8, 4 * n, 4 * n + 2) for n in order))
    data = pack(recording)
    assert len(data) <= MAX_BYTES
    told = unpack(data)
    assert len(told.runs) <= MAX_RUNS
    for file in range(8):
        blocks = {block for run in told.of(file) for block in run}
        assert blocks >= {block for run in recording.of(file) for block in run}


def _sealed(body: bytes) -> bytes:
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


HEAD = struct.pack("<8s16sI", b"FCORDER1", bytes(16), MIB)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(100),
        pack(Recording(MODEL, MIB, (Run(0, 0, 1),)))[:-1],
        b"x" + pack(Recording(MODEL, MIB, (Run(0, 0, 1),)))[1:],
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
    with pytest.raises(RecordingError):
        unpack(data)


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_recording_or_an_error(body: bytes) -> None:
    for data in (body, _sealed(HEAD + body)):
        try:
            unpack(data)
        except RecordingError:
            continue


def test_a_recording_of_other_files_does_not_fit() -> None:
    recording = Recording(MODEL, MIB, (Run(1, 0, 10),))
    assert recording.fits(MODEL, MIB, [5, 10])
    assert not recording.fits(MODEL, MIB, [5, 9])
    assert not recording.fits(MODEL, MIB, [5])
    assert not recording.fits(MODEL, 2 * MIB, [5, 10])
    assert not recording.fits(MODEL[::-1], MIB, [5, 10])


def test_another_version_of_a_file_is_another_model() -> None:
    files = [version("a.bin", 10), version("b.bin", 10)]
    assert model_id(files) == model_id(reversed(files))
    assert len({model_id(files), model_id(files[:1]), model_id([files[0], version("b.bin", 10, "2")])}) == 3


def test_ranks_that_read_at_the_same_time_take_turns_in_the_recording() -> None:
    recorder = Recorder(MODEL, MIB, [100, 100], MIB)
    for block in range(100):
        recorder.asked(0, block, block + 1, 11)
        recorder.asked(1, block, block + 1, 12)
    recording = recorder.finish({})
    assert recording is not None
    assert recording.ranks == 2
    assert recording.blocks == 200
    assert len(recording.runs) >= 6
    assert {run.file for run in recording.runs[:2]} == {0, 1}
    assert all(run.stop - run.start <= 32 for run in recording.runs)


def test_a_file_read_in_order_is_one_run_though_its_reads_arrive_out_of_order() -> None:
    recorder = Recorder(MODEL, MIB, [40], MIB)
    for block in (1, 0, 3, 2, *range(4, 40)):
        recorder.asked(0, block, block + 1, 11)
    recording = recorder.finish({})
    assert recording is not None
    assert recording.runs == (Run(0, 0, 40),)


def test_what_lies_beside_a_tensor_that_was_read_is_left_out() -> None:
    layout = Layout(((0, 1000),), tuple((1000 + n * 20 * MIB, 1000 + (n + 1) * 20 * MIB) for n in range(5)))
    recorder = Recorder(MODEL, MIB, [101], MIB)
    recorder.asked(0, 0, 1, 11)
    recorder.asked(0, 38, 63, 11)  # the third tensor, two blocks before it and two behind
    recorder.asked(0, 90, 95, 11)  # the middle of the last one
    recording = recorder.finish({0: layout})
    assert recording is not None
    assert recording.of(0) == [range(1), range(40, 61), range(90, 95)]


def test_a_look_at_the_headers_is_no_load() -> None:
    recorder = Recorder(MODEL, MIB, [100, 100], MIB)
    for file in (0, 1):
        recorder.asked(file, 0, 1, 11)
    assert recorder.finish({}) is None


def test_a_load_that_did_not_open_all_files_says_nothing_of_what_is_not_read() -> None:
    recorder = Recorder(MODEL, MIB, [100, 100], MIB)
    recorder.asked(1, 20, 50, 11)
    recording = recorder.finish({})
    assert recording is not None
    assert recording.runs[0] == Run(1, 20, 50)
    assert recording.blocks == 100


def test_a_file_that_the_kernel_reads_is_read_whole() -> None:
    recorder = Recorder(MODEL, MIB, [30, 30], MIB)
    recorder.opened(1, whole=True)
    recorder.opened(0)
    recorder.asked(0, 0, 9, 11)
    recording = recorder.finish({})
    assert recording is not None
    assert recording.runs == (Run(1, 0, 30), Run(0, 0, 9))


def test_edges_of_small_tensors_stay() -> None:
    wanted = bytearray(b"\1" * 10)
    leave_out_edges(wanted, Layout((), tuple((n * MIB // 2, (n + 1) * MIB // 2) for n in range(20))), MIB, 3)
    assert wanted == bytearray(b"\1" * 10)


def test_the_shelf_keeps_few_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.store.orders.MOST_FILES", 3)
    shelf = Orders(tmp_path)
    assert shelf.load(MODEL) is None
    assert shelf.count() == 0
    for number in range(5):
        shelf.save(f"{number:032x}", bytes([number]))
    assert shelf.count() == 3
    shelf.save("../../etc/passwd", b"x")
    shelf.save(MODEL, bytes(MAX_BYTES + 1))
    assert shelf.load("../format") is None
    assert shelf.load(MODEL) is None
    (tmp_path / "orders" / f"{MODEL}.order").write_bytes(bytes(MAX_BYTES + 1))
    assert shelf.load(MODEL) is None


def test_a_shelf_that_can_not_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "orders").write_text("a file is in the way")
    shelf = Orders(tmp_path)
    shelf.save(MODEL, b"x")
    assert shelf.load(MODEL) is None
    assert shelf.count() == 0
