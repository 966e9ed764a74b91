"""A program that reads one model's config.json is about to load it; one that reads many is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fusecache.fetch.service import FetchService
from fusecache.fetch.settings import FetchSettings
from fusecache.prefetch.browse_detector import BrowseDetector
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.support.scripted import WAIT, ScriptedOrigin, Step, version
from tests.support.servers import wait_until
from tests.unit.test_fetch_service import BLOCK, RecordingCatalog, fetching

Start = Callable[..., tuple[FetchService, ScriptedOrigin, RecordingCatalog]]


class Folders(RecordingCatalog):
    """A library of several folders."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        folder = version.key.rpartition("/")[0]
        return [other for other in self.versions if other.key.rpartition("/")[0] == folder]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def build(
            files: Sequence[ObjectVersion], **settings: object
        ) -> tuple[FetchService, ScriptedOrigin, RecordingCatalog]:
            store = stack.enter_context(Store(tmp_path / "c", limit=1 << 30, free_floor=0, block_size=BLOCK))
            origin, catalog_view = ScriptedOrigin(files), Folders(files)
            values = FetchSettings(concurrency=4, range_bytes=2 * BLOCK, **settings)  # type: ignore[arg-type]
            fetch_service = stack.enter_context(fetching(store, origin, catalog_view, values))
            return fetch_service, origin, catalog_view

        yield build


def model(folder: str, shards: int = 2) -> list[ObjectVersion]:
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    return [
        version(f"{folder}/config.json", 100),
        *(version(f"{folder}/{name}", 4 * BLOCK) for name in names),
    ]


def read(loader: FetchService, file: ObjectVersion) -> None:
    object_fetch = loader.open_object(file, "")
    loader.read_bytes(object_fetch, 0, file.size)
    loader.release_fetch(object_fetch)


def test_a_model_is_fetched_when_its_config_is_read(start: Start) -> None:
    files = model("llama") + model("other")
    fetch_service, origin, catalog_view = start(files)
    read(fetch_service, files[0])
    for file in files[:3]:
        catalog_view.wait(file.key)
    assert {key for key, _, _ in origin.reads} == {file.key for file in files[:3]}


def test_without_prefetch_a_config_is_a_file(start: Start) -> None:
    files = model("llama")
    fetch_service, origin, _library = start(files, prefetch=False)
    read(fetch_service, files[0])
    assert fetch_service.progress()["planned"] == 0
    assert {key for key, _, _ in origin.reads} == {"llama/config.json"}


def test_who_reads_many_configs_has_no_model_fetched(start: Start) -> None:
    folders = [f"m-{number}" for number in range(20)]
    files = [file for folder in folders for file in model(folder)]
    fetch_service, origin, catalog_view = start(files)
    step = Step()
    hold = step.hold_from(0)

    def gate(found: ObjectVersion, offset: int) -> None:
        if not found.key.endswith(".json"):
            hold(found, offset)

    origin.gate = gate
    for file in files:
        if file.key.endswith(".json"):
            read(fetch_service, file)
    step.open()
    wait_until(lambda: fetch_service.progress()["fetching"] == 0, "nothing that is fetched", WAIT)
    assert fetch_service.progress()["planned"] == 0
    shards = {key for key, _, _ in origin.reads if not key.endswith(".json")}
    assert len(shards) <= 4  # one per thread of the crew, begun before it was known
    # one that is really loaded is fetched all the same
    read(fetch_service, files[-1])
    for file in files[-3:]:
        catalog_view.wait(file.key)


def test_announcements_are_forgotten_and_kept_apart_from_loads() -> None:
    announced = BrowseDetector()
    for number in range(8):
        assert announced.announce_folder(f"{number}", 0.0) == []
    assert sorted(announced.announce_folder("8", 1.0)) == [str(number) for number in range(9)]
    announced.weights_read("3")
    assert announced.announce_folder("8", 1.0) == []
    assert "9" in announced.announce_folder("9", 2.0)
    assert announced.announce_folder("10", 61.5) == []
