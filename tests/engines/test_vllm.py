"""vLLM serves a model from the mount, cold, and says what it says from a local copy: tokens and probabilities.

The engine is vLLM itself (the build for CPUs), unmodified. Every way that it has of reading safetensors is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import models
from tests.engines.library import Library
from tests.engines.process import Engine, EngineError, environment
from tests.support.mounting import needs_fuse

pytestmark = [needs_fuse, pytest.mark.engines, pytest.mark.timeout(400)]

_START = 240.0
"""Seconds for a call that imports vLLM first, or starts ranks that do."""
_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",  # the sampler would be compiled, by g++ and for 20 s
}
_MULTITHREAD = {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 8}}
_STRATEGIES: dict[str, dict[str, Any]] = {
    "default": {},
    "lazy": {"safetensors_load_strategy": "lazy"},
    "eager": {"safetensors_load_strategy": "eager"},
    "prefetch": {"safetensors_load_strategy": "prefetch"},
    "multithread": _MULTITHREAD,
    "safetensors": {"load_format": "safetensors"},
    "runai_streamer": {"load_format": "runai_streamer"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("vllm") / "llama", hidden=256)


@pytest.fixture(scope="module")
def vllm(home: Path) -> Iterator[Engine]:
    """tests/engines/vllm_engine.py, running."""
    engine = Engine("tests.engines.vllm_engine", home / "vllm.log", environment(home, **_CPU))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def wanted(vllm: Engine, llama: Path) -> list[dict[str, Any]]:
    """The text that vLLM generates from the local copy."""
    found = vllm.call("generate", folder=str(llama), deadline=_START)
    assert len({tuple(each["tokens"]) for each in found}) == len(models.PROMPTS)
    return found


@pytest.mark.parametrize("strategy", _STRATEGIES)
def test_tokens_are_those_of_a_local_copy(
    strategy: str, library: Library, vllm: Engine, llama: Path, wanted: list[dict[str, Any]]
) -> None:
    options = _STRATEGIES[strategy]
    folder = library.serve(f"vllm-{strategy}", llama)
    said = len(vllm.output())
    cold, warm = library.cold_and_warm(
        folder, lambda path: vllm.call("generate", folder=path, deadline=_START, **options)
    )
    assert cold == wanted
    assert warm == wanted
    output = vllm.output()[said:]
    expected = {
        "default": "Filesystem type for checkpoints: FUSE.FUSECACHE",
        "eager": "checkpoint shards (eager)",
        "prefetch": "Prefetching checkpoint files into page cache started",
        "multithread": "Multi-thread loading shards",
        "runai_streamer": "using Runai Model Streamer",
    }
    assert expected.get(strategy, "") in output
    if strategy == "default":
        assert "Prefetching checkpoint files" not in output, "its own prefetch is for NFS and Lustre"


def test_the_load_format_fastsafetensors(
    library: Library, vllm: Engine, llama: Path, wanted: list[dict[str, Any]]
) -> None:
    """vLLM gives it a CUDA device. Without one, test_torch.py runs the same pipeline with the CPU."""
    load = {"load_format": "fastsafetensors", "deadline": _START}
    try:
        vllm.call("generate", folder=str(llama), **load)
    except EngineError as error:
        if "cuda" not in error.text.lower():
            raise
        pytest.skip(f"vLLM's fastsafetensors needs a GPU: on the local disk {error.kind}: {error.text}")
    folder = library.serve("vllm-fastsafetensors", llama)
    cold, _ = library.cold_and_warm(folder, lambda path: vllm.call("generate", folder=path, **load))
    assert [each["tokens"] for each in cold] == [each["tokens"] for each in wanted]


def test_two_ranks(plain: Library, llama: Path, wanted: list[dict[str, Any]], home: Path) -> None:
    """Tensor parallelism: two processes read the shards at once, cold; together they cost one download."""
    settings = _CPU | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings |= {"OMP_NUM_THREADS": "1"}
    engine = Engine("tests.engines.vllm_engine", home / "ranks.log", environment(home, **settings))
    try:
        folder = plain.serve("vllm-ranks", llama)
        before = plain.figures()
        found = engine.call("generate", folder=str(folder), deadline=_START, tensor_parallel_size=2)
        size = sum(file.stat().st_size for file in llama.iterdir())
        assert plain.figures().origin - before.origin <= size
        for each, local in zip(found, wanted, strict=True):
            assert each["tokens"] == local["tokens"]
            assert each["logprobs"] == pytest.approx(local["logprobs"], abs=1e-4)  # sums in another order
    finally:
        engine.close()


@pytest.mark.parametrize("broken", ["missing-shard", "truncated-shard", "lying-header"])
def test_broken_models_fail_as_on_a_disk(broken: str, plain: Library, vllm: Engine, tmp_path: Path) -> None:
    local = models.llama(tmp_path / "model")
    shard = local / "model-00002-of-00003.safetensors"
    if broken == "missing-shard":
        shard.unlink()
    elif broken == "truncated-shard":
        shard.write_bytes(shard.read_bytes()[:-4096])
    else:
        shard.write_bytes((1 << 62).to_bytes(8, "little") + shard.read_bytes()[8:])
    told = []
    for folder in (local, plain.serve(f"vllm-{broken}", local)):
        with pytest.raises(EngineError) as raised:
            vllm.call("generate", folder=str(folder), deadline=_START)
        told.append((raised.value.kind, raised.value.text.replace(str(folder), "FOLDER")))
    assert told[0] == told[1]
    assert told[0][0] in ("FileNotFoundError", "SafetensorError")
