"""Loaders of the torch world read on the mount, cold and warm, what they read from a local copy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import models
from tests.engines.library import Library
from tests.engines.process import Engine, EngineError, environment
from tests.support.mounting import needs_fuse

pytestmark = [needs_fuse, pytest.mark.engines]

_FIRST = 100.0
"""Seconds for a call that may import torch first."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("torch") / "llama")


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[Engine]:
    """tests/engines/torch_loaders.py, running."""
    made = Engine("tests.engines.torch_loaders", home / "torch.log", environment(home))
    yield made
    made.close()


def calling(engine: Engine, name: str, **arguments: Any) -> Callable[[str], Any]:
    return lambda folder: engine.call(name, folder=folder, deadline=_FIRST, **arguments)


@pytest.mark.parametrize(
    "loader", ["safetensors_mmap", "safetensors_pread", "safetensors_file", "transformers"]
)
def test_content_is_that_of_a_local_copy(loader: str, library: Library, engine: Engine, llama: Path) -> None:
    load = calling(engine, loader)
    wanted = load(str(llama))
    cold, warm = library.cold_and_warm(library.serve(f"torch-{loader}", llama), load)
    assert cold == warm == wanted


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load(mmap: bool, library: Library, engine: Engine, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    local = models.pytorch(tmp_path / "model", llama)
    load = calling(engine, "torch_load", mmap=mmap)
    wanted = load(str(local))
    cold, warm = library.cold_and_warm(library.serve(f"torch-load-{mmap}", local), load)
    assert cold == warm == wanted
    assert wanted == calling(engine, "safetensors_file")(str(llama))


def test_fastsafetensors_reads_direct(library: Library, engine: Engine, llama: Path) -> None:
    """Its list of network file systems, which it reads buffered, does not have fuse.fusecache: O_DIRECT it is."""
    load = calling(engine, "fastsafetensors")
    wanted = load(str(llama))["weights"]
    cold, warm = library.cold_and_warm(library.serve("fastsafetensors", llama), load)
    for found in (cold, warm):
        assert found["weights"] == wanted
        assert sorted(found["direct"]) == sorted(file.name for file in llama.glob("*.safetensors"))


_STRATEGIES = {
    "io_uring_direct": "io_uring submit: ",
    "libaio_direct": "libaio io_submit: ",
    "sync_buffered": "",
}


@pytest.mark.parametrize("strategy", _STRATEGIES)
def test_runai_model_streamer(strategy: str, library: Library, llama: Path, home: Path) -> None:
    """A process each: the strategy is fixed with the first request. Its log says that it did what it was told."""
    log = home / f"runai-{strategy}-{library.prefix}.log"
    settings = {"RUNAI_STREAMER_FS_STRATEGY": strategy, "RUNAI_STREAMER_LOG_LEVEL": "DEBUG"}
    engine = Engine(
        "tests.engines.torch_loaders", log, environment(home, RUNAI_STREAMER_LOG_TO_STDERR="1", **settings)
    )
    try:
        load = calling(engine, "runai")
        wanted = load(str(llama))
        if _STRATEGIES[strategy] not in engine.output():
            pytest.skip(
                f"this kernel or container has no {strategy}: even on the local disk it reads otherwise"
            )
        said = len(engine.output())
        cold, warm = library.cold_and_warm(library.serve(f"runai-{strategy}", llama), load)
        assert cold == warm == wanted
        output = engine.output()[said:]
        assert _STRATEGIES[strategy] in output
        assert "reading it buffered" not in output
        assert "Direct reads refused" not in output
    finally:
        engine.close()


def test_broken_models(plain: Library, engine: Engine, llama: Path, tmp_path: Path) -> None:
    """The errors are those of a local disk, and come in time."""
    pytest.importorskip("torch")
    bins = models.pytorch(tmp_path / "bins", llama)
    short = next(bins.glob("*.bin"))
    short.write_bytes(short.read_bytes()[:-1000])
    missing = models.llama(tmp_path / "missing")
    (missing / "model-00002-of-00003.safetensors").unlink()
    cut = models.llama(tmp_path / "cut")
    shard = cut / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    lost = models.llama(tmp_path / "lost")
    (lost / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 7}}))
    for loader, local in [
        ("torch_load", bins),
        ("transformers", missing),
        ("transformers", cut),
        ("transformers", lost),
        ("fastsafetensors", cut),
        ("runai", cut),
        ("safetensors_pread", cut),
    ]:
        more = {"mmap": True} if loader == "torch_load" else {}
        told = []
        for folder in (local, plain.serve(f"broken-{loader}-{local.name}", local)):
            with pytest.raises(EngineError) as raised:
                calling(engine, loader, **more)(str(folder))
            told.append((raised.value.kind, raised.value.text.replace(str(folder), "FOLDER")))
        assert told[0] == told[1], loader
