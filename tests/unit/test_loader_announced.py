"""Who reads a model's config.json is about to load it; who reads many is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fusecache.loader.announced import Announced
from fusecache.loader.interface import LoaderSettings
from fusecache.loader.loader import Loader
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.support.scripted import WAIT, ScriptedOrigin, Step, version
from tests.support.servers import wait_until
from tests.unit.test_loader import BLOCK, Recorder

Start = Callable[..., tuple[Loader, ScriptedOrigin, Recorder]]


class Folders(Recorder):
    """A library of several folders."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        folder = version.key.rpartition("/")[0]
        return [other for other in self.versions if other.key.rpartition("/")[0] == folder]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def build(
            files: Sequence[ObjectVersion], **settings: object
        ) -> tuple[Loader, ScriptedOrigin, Recorder]:
            store = stack.enter_context(Store(tmp_path / "c", limit=1 << 30, free_floor=0, block_size=BLOCK))
            origin, library = ScriptedOrigin(files), Folders(files)
            values = LoaderSettings(concurrency=4, range_bytes=2 * BLOCK, **settings)  # type: ignore[arg-type]
            loader = stack.enter_context(Loader(store, {"": origin}, library, values))
            return loader, origin, library

        yield build


def model(folder: str, shards: int = 2) -> list[ObjectVersion]:
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    return [
        version(f"{folder}/config.json", 100),
        *(version(f"{folder}/{name}", 4 * BLOCK) for name in names),
    ]


def read(loader: Loader, file: ObjectVersion) -> None:
    load = loader.open(file, "")
    loader.read(load, 0, file.size)
    loader.release(load)


def test_a_model_is_fetched_when_its_config_is_read(start: Start) -> None:
    files = model("llama") + model("other")
    loader, origin, library = start(files)
    read(loader, files[0])
    for file in files[:3]:
        library.wait(file.key)
    assert {key for key, _, _ in origin.reads} == {file.key for file in files[:3]}


def test_without_prefetch_a_config_is_a_file(start: Start) -> None:
    files = model("llama")
    loader, origin, _library = start(files, prefetch=False)
    read(loader, files[0])
    assert loader.progress()["planned"] == 0
    assert {key for key, _, _ in origin.reads} == {"llama/config.json"}


def test_who_reads_many_configs_has_no_model_fetched(start: Start) -> None:
    folders = [f"m-{number}" for number in range(20)]
    files = [file for folder in folders for file in model(folder)]
    loader, origin, library = start(files)
    step = Step()
    hold = step.hold_from(0)

    def gate(found: ObjectVersion, offset: int) -> None:
        if not found.key.endswith(".json"):
            hold(found, offset)

    origin.gate = gate
    for file in files:
        if file.key.endswith(".json"):
            read(loader, file)
    step.open()
    wait_until(lambda: loader.progress()["fetching"] == 0, "nothing that is fetched", WAIT)
    assert loader.progress()["planned"] == 0
    shards = {key for key, _, _ in origin.reads if not key.endswith(".json")}
    assert len(shards) <= 4  # one per thread of the crew, begun before it was known
    # one that is really loaded is fetched all the same
    read(loader, files[-1])
    for file in files[-3:]:
        library.wait(file.key)


def test_announcements_are_forgotten_and_kept_apart_from_loads() -> None:
    announced = Announced()
    for number in range(8):
        assert announced.add(f"{number}", 0.0) == []
    assert sorted(announced.add("8", 1.0)) == [str(number) for number in range(9)]
    announced.loaded("3")
    assert announced.add("8", 1.0) == []
    assert "9" in announced.add("9", 2.0)
    assert announced.add("10", 61.5) == []
