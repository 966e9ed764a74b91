"""Headers first, recordings kept and followed: the loader with the real store and an origin that a test watches."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import xxhash

from fusecache.fetch import prefetch_queues
from fusecache.fetch.block_source import OriginBlockSource
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.settings import FetchSettings
from fusecache.prefetch import backfill, model_registry, model_shards, session_tracker
from fusecache.prefetch.interface import PrefetchSettings
from fusecache.prefetch.model_shards import LoadSession, ModelShards
from fusecache.prefetch.models.shard_order import shard_group, shards_of_model
from fusecache.prefetch.prefetcher import Prefetcher
from fusecache.prefetch.profile_follower import ProfileFollower
from fusecache.prefetch.profiles.access_profile import AccessProfile, ProfileRun, id_of_model, pack_profile
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.store.object import StoredObject
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.support.content import check, content
from tests.support.scripted import WAIT, ScriptedOrigin, version
from tests.support.servers import wait_until
from tests.unit.test_fetch_service import BLOCK, RecordingCatalog

BLOCKS = 40
FILES = [version(f"m-{number}-of-3.safetensors", BLOCKS * BLOCK) for number in (1, 2, 3)]


class Kept:
    """A profile store, and other nodes, in memory."""

    def __init__(self) -> None:
        self.here: dict[str, bytes] = {}
        self.elsewhere: dict[str, bytes] = {}
        self.offered: list[str] = []
        self.found = threading.Event()

    def load_profile(self, name: str) -> bytes | None:
        return self.here.get(name)

    def save_profile(self, name: str, data: bytes) -> None:
        self.here[name] = data

    def find_profile(self, name: str) -> bytes | None:
        self.found.set()
        return self.elsewhere.get(name)

    def offer_profile(self, name: str) -> None:
        self.offered.append(name)


def recorded(*runs: ProfileRun, files: Sequence[ObjectVersion] = FILES) -> bytes:
    return pack_profile(AccessProfile(id_of_model(files), BLOCK, runs))


SPARSE = (ProfileRun(2, 30, 36), ProfileRun(0, 8, 14), ProfileRun(1, 20, 24), ProfileRun(0, 0, 2))


class Bench:
    def __init__(self, directory: Path, kept: Kept, *, others: bool = False, limit: int = 1 << 30) -> None:
        self.kept = kept
        self.origin = ScriptedOrigin(FILES, chunk=BLOCK)
        self.store = Store(directory, limit=limit, free_floor=0, block_size=BLOCK)
        settings = FetchSettings(concurrency=2, range_bytes=2 * BLOCK, deadline=WAIT)
        self.catalog = RecordingCatalog(FILES)
        self.loader = FetchService(
            self.store, OriginBlockSource({"": self.origin}), settings, events=self.catalog.events
        )
        self.observer = self.loader.observers
        self.prefetcher = Prefetcher(
            self.loader,
            self.catalog,
            PrefetchSettings(read_ahead=BLOCK),
            cast(ProfileStore, kept),
            kept if others else None,
        )
        self.loader.start()

    def close(self) -> None:
        self.loader.close()
        self.store.close()

    def blocks(self) -> list[tuple[int, int]]:
        """(file, block) as they were asked of the origin."""
        numbers = {file.key: number for number, file in enumerate(FILES)}
        return [
            (numbers[key], at // BLOCK)
            for key, offset, length in self.origin.reads
            for at in range(offset, offset + length, BLOCK)
        ]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def bench(tmp_path: Path, kept: Kept) -> Iterator[Bench]:
    made = Bench(tmp_path / "cache", kept)
    yield made
    made.close()


def read(bench: Bench, file: int, block: int) -> None:
    """As the kernel does it for a reader, who opens and closes the file."""
    object_fetch = bench.loader.open_object(FILES[file], "")
    bench.observer.file_opened(FILES[file], is_passthrough=False)
    bench.observer.read(object_fetch, block * BLOCK, BLOCK, 7)
    check(bench.loader.read_bytes(object_fetch, block * BLOCK, BLOCK), FILES[file].key, "1", block * BLOCK)
    bench.observer.file_closed(FILES[file])
    bench.loader.release_fetch(object_fetch)


def fill(stored: StoredObject) -> None:
    """Put all of an object into the store, without the loader."""
    assert stored.reserve_bytes(stored.version.size)
    for block in range(stored.block_count):
        data = content(stored.version.key, "1", block * BLOCK, BLOCK)
        stored.write(block * BLOCK, data)
        stored.commit_block(block, xxhash.xxh3_64_intdigest(data))


def test_the_headers_of_all_files_come_before_the_bulk_of_any(bench: Bench) -> None:
    read(bench, 0, 0)
    wait_until(lambda: len(bench.origin.reads) > 8, "some bulk", 20)
    asked = bench.blocks()
    demanded = 2  # the flight of the reader's own block
    assert {(1, 0), (2, 0)} <= set(asked[: demanded + 2])


def test_a_recording_is_followed_and_nothing_else_is_fetched(bench: Bench, kept: Kept) -> None:
    kept.here[id_of_model(FILES)] = recorded(*SPARSE)
    read(bench, 0, 0)
    wanted = [(run.file, block) for run in SPARSE for block in range(run.start, run.stop)]
    wait_until(lambda: set(wanted) <= set(bench.blocks()), "what was recorded", 20)
    asked = bench.blocks()
    assert set(asked) == set(wanted) | {(1, 0), (2, 0)}
    in_order = [entry for entry in asked if entry in wanted and entry not in ((0, 0), (0, 1))]
    assert in_order == [entry for entry in wanted if entry not in ((0, 0), (0, 1))]
    assert bench.prefetcher.stats.replayed == 1


def test_a_reader_who_strays_gets_all_of_it_fetched(bench: Bench, kept: Kept) -> None:
    kept.here[id_of_model(FILES)] = recorded(*SPARSE)
    for block in (39, 24, 28, 32, 36, 20):
        read(bench, 0, block)
    wait_until(lambda: len(set(bench.blocks())) == 3 * BLOCKS, "everything", 20)
    assert bench.prefetcher.stats.wrong == 1


def test_readers_who_stray_before_the_study_is_over_get_all_of_it_fetched(
    bench: Bench, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.here[id_of_model(FILES)] = recorded(*SPARSE)
    may_study = threading.Event()
    study = ProfileFollower._study_model

    def study_late(self: ProfileFollower, model: ModelShards, session: LoadSession) -> None:
        assert may_study.wait(WAIT)
        study(self, model, session)

    monkeypatch.setattr(ProfileFollower, "_study_model", study_late)
    try:
        for block in (
            39,
            24,
            28,
            32,
            36,
            20,
        ):  # each read opens and closes the file, which nothing else has open
            read(bench, 0, block)
        assert bench.prefetcher.stats.wrong == 1
    finally:
        may_study.set()
    wait_until(lambda: len(set(bench.blocks())) == 3 * BLOCKS, "everything", 20)


@pytest.mark.parametrize("is_over", [False, True])
def test_a_study_that_ends_late_masks_no_file_of_a_load_whose_readers_strayed(
    bench: Bench, kept: Kept, is_over: bool
) -> None:
    kept.here[id_of_model(FILES)] = recorded(*SPARSE)
    object_fetch = bench.loader.open_object(FILES[0], "")
    assert object_fetch.prefetch_mask is not None
    file = bench.prefetcher._registry.find_file(FILES[0].id)
    assert file is not None
    with bench.loader.lock:
        session = bench.prefetcher._tracker.current_session_locked(file.model)
        bench.prefetcher._follower._abandon_profile_locked(file.model, object_fetch)
        if is_over:
            file.model.session = file.model.recorder = None
    bench.prefetcher._follower._study_ended(file.model, session)
    assert object_fetch.prefetch_mask is None
    bench.loader.release_fetch(object_fetch)


def test_a_recording_of_another_version_is_not_followed(bench: Bench, kept: Kept) -> None:
    other = [*FILES[:2], version(FILES[2].key, BLOCKS * BLOCK, "2")]
    kept.here[id_of_model(FILES)] = recorded(*SPARSE, files=other)
    read(bench, 0, 0)
    wait_until(lambda: len(set(bench.blocks())) == 3 * BLOCKS, "everything", 20)
    assert bench.prefetcher.stats.replayed == 0


def test_a_load_is_recorded_and_offered_when_it_is_over(tmp_path: Path, kept: Kept) -> None:
    bench = Bench(tmp_path / "cache", kept, others=True)
    for file, block in ((2, 5), (2, 6), (0, 11), (1, 0), (2, 7), (2, 8)):
        read(bench, file, block)
    for block in range(20, 30):
        read(bench, 1, block)
    bench.close()
    assert kept.offered == [id_of_model(FILES)]
    assert set(kept.here) == {id_of_model(FILES)}


def test_what_another_node_recorded_is_followed_and_kept(tmp_path: Path, kept: Kept) -> None:
    name = id_of_model(FILES)
    kept.elsewhere[name] = recorded(*SPARSE)
    bench = Bench(tmp_path / "cache", kept, others=True)
    read(bench, 0, 0)
    wanted = {(run.file, block) for run in SPARSE for block in range(run.start, run.stop)}
    wait_until(lambda: wanted <= set(bench.blocks()), "what was recorded", 20)
    assert set(bench.blocks()) == wanted | {(1, 0), (2, 0)}
    assert kept.here[name] == kept.elsewhere[name]
    bench.close()


@pytest.mark.parametrize("data", [b"", b"junk" * 100, struct.pack("<8s16sI", b"FCORDER9", bytes(16), 1)])
def test_junk_from_another_node_is_passed_over(tmp_path: Path, kept: Kept, data: bytes) -> None:
    kept.elsewhere[id_of_model(FILES)] = data
    bench = Bench(tmp_path / "cache", kept, others=True)
    read(bench, 0, 0)
    wait_until(lambda: len(set(bench.blocks())) == 3 * BLOCKS, "everything", 20)
    assert kept.here == {}
    bench.close()


def test_which_files_make_up_a_model() -> None:
    names = [
        "config.json",
        "m-1-of-2.safetensors",
        "m-2-of-2.safetensors",
        "a-Q4_0.gguf",
        "a-Q8_0.gguf",
        "b-1-of-2.gguf",
        "b-2-of-2.gguf",
        "x-1-of-2.bin",
        "x-2-of-2.bin",
        "training_args.bin",
    ]
    assert shards_of_model(names[1], names) == names[1:3]
    assert shards_of_model("config.json", names) == names[1:3]
    assert shards_of_model("x.bin.index.json", names) == names[7:9]
    assert shards_of_model(names[3], names) == [names[3]]
    assert shards_of_model(names[5], names) == names[5:7]
    assert shards_of_model(names[9], names) == [names[9]]
    assert shards_of_model("config.json", ["config.json"]) == []
    assert shard_group("part-1.bin") == shard_group("part-22.bin") != shard_group("part.bin")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits are short."""
    monkeypatch.setattr(backfill, "QUIET_SECONDS", 0.4)
    monkeypatch.setattr(prefetch_queues, "QUIET_SECONDS", 0.4)
    monkeypatch.setattr(model_shards, "CLOSED_SECONDS", 0.2)
    monkeypatch.setattr(model_shards, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(session_tracker, "_SESSION_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(model_registry, "_WHOLE_CHECK_SECONDS", 0.1)


@pytest.mark.usefixtures("hurried")
def test_what_a_recording_left_out_comes_when_all_is_quiet(bench: Bench, kept: Kept) -> None:
    kept.here[id_of_model(FILES)] = recorded(*SPARSE)
    read(bench, 0, 0)
    wait_until(lambda: len(set(bench.blocks())) == 3 * BLOCKS, "everything", 20)
    assert len(bench.blocks()) == 3 * BLOCKS
    assert bench.prefetcher.stats.wrong == 0


@pytest.mark.usefixtures("hurried")
def test_nothing_is_evicted_for_what_a_recording_left_out(tmp_path: Path, kept: Kept) -> None:
    kept.here[id_of_model(FILES)] = recorded(*SPARSE)
    bench = Bench(tmp_path / "cache", kept, limit=2 * BLOCKS * BLOCK)
    try:
        read(bench, 0, 0)
        wait_until(lambda: len({file for file, _ in bench.blocks()}) == 3, "the headers", 20)
        wait_until(lambda: not bench.prefetcher.backfill, "all was looked at", 20)
        kept_blocks = sum(info.present_bytes for info in bench.store.objects()) // BLOCK
        assert kept_blocks < 2 * BLOCKS
        assert bench.store.usage().evictions == 0
    finally:
        bench.close()


@pytest.mark.usefixtures("hurried")
def test_a_load_is_over_when_nobody_reads_though_files_are_open(bench: Bench, kept: Kept) -> None:
    object_fetch = bench.loader.open_object(FILES[0], "")
    bench.observer.file_opened(FILES[0], is_passthrough=False)
    for block in range(12):
        bench.observer.read(object_fetch, block * BLOCK, BLOCK, 7)
        bench.loader.read_bytes(object_fetch, block * BLOCK, BLOCK)
    assert kept.here == {}
    wait_until(lambda: kept.here, "a recording", 20)
    assert set(kept.here) == {id_of_model(FILES)}
    bench.observer.file_closed(FILES[0])
    bench.loader.release_fetch(object_fetch)


@pytest.mark.usefixtures("hurried")
def test_a_load_of_a_model_that_is_whole_has_no_session(bench: Bench) -> None:
    config = version("config.json", 100)
    bench.catalog.versions = [*FILES, config]
    for file in FILES:
        object_fetch = bench.loader.open_object(
            file, ""
        )  # as the first open of each, before it leads to passthrough
        fill(object_fetch.stored)
        bench.loader.release_fetch(object_fetch)
    opened: list[str] = []
    obtain = bench.loader.fetches.acquire

    def watched(file: ObjectVersion, source: str) -> ObjectFetch:
        opened.append(file.key)
        return obtain(file, source)

    bench.loader.fetches.acquire = watched  # type: ignore[method-assign]
    for file in (config, *FILES):
        assert not bench.observer.file_opened(file, is_passthrough=True)
        bench.observer.whole_file_wanted(file, "")
    done = threading.Event()
    bench.loader.dispatcher.run_soon(done.set)
    assert done.wait(WAIT)
    bench.loader.close()
    assert opened == []
    assert bench.origin.reads == []


@pytest.mark.usefixtures("hurried")
def test_what_is_evicted_of_a_model_is_fetched_when_another_file_of_it_is_opened(bench: Bench) -> None:
    for file in FILES:
        object_fetch = bench.loader.open_object(file, "")
        fill(object_fetch.stored)
        bench.loader.release_fetch(object_fetch)
    assert not bench.observer.file_opened(FILES[0], is_passthrough=True)
    bench.store.evict(FILES[2].id)
    wait_until(
        lambda: bench.observer.file_opened(FILES[0], is_passthrough=True),
        "a look at the disk",
        20,
    )
    bench.observer.whole_file_wanted(FILES[0], "")
    wait_until(lambda: set(bench.blocks()) == {(2, block) for block in range(BLOCKS)}, "the third file", 20)
    bench.observer.file_closed(FILES[0])
