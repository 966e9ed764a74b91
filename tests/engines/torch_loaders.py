"""Loaders that need torch, one function each, like those of `tests/engines/loaders.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.engines.loaders import Digests, digest, shards
from tests.engines.models import PROMPTS
from tests.engines.process import answer


def _digest(tensors: Iterator[tuple[str, torch.Tensor]]) -> Digests:
    return digest((name, tensor.detach().numpy()) for name, tensor in tensors)


def safetensors_mmap(folder: str) -> Digests:
    """safe_open: tensors are views of a mapping."""
    return _digest(_opened(folder))


def safetensors_pread(folder: str) -> Digests:
    """safe_open with the backend that reads with pread(2)."""
    return _digest(_opened(folder, backend="pread"))


def safetensors_file(folder: str) -> Digests:
    """load_file of every shard."""
    from safetensors.torch import load_file

    return _digest(item for file in shards(folder) for item in load_file(file).items())


def _opened(folder: str, **how: str) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for file in shards(folder):
        with safe_open(file, framework="pt", **how) as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                yield name, opened.get_tensor(name)


def torch_load(folder: str, mmap: bool) -> Digests:
    """torch.load of zip files of pickles."""
    files = sorted(Path(folder).glob("*.bin"))
    return _digest(item for file in files for item in torch.load(file, mmap=mmap, weights_only=True).items())


def transformers(folder: str) -> dict[str, Any]:
    """from_pretrained of tokenizer and model; the weights, and the tokens that it continues a prompt with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        tokens.append(model.generate(**given, max_new_tokens=8, do_sample=False)[0].tolist())
    return {"weights": _digest(iter(model.state_dict().items())), "tokens": tokens}


def fastsafetensors(folder: str) -> dict[str, Any]:
    """The pipeline that vLLM's load format of this name uses, with the CPU as device; which opens were direct."""
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    files = [str(file) for file in shards(folder)]
    direct: list[str] = []
    opened = os.open

    def recording(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        fd = opened(path, flags, *rest, **more)
        if flags & os.O_DIRECT:
            direct.append(os.path.basename(path))
        return fd

    os.open = recording
    try:
        loader = ParallelLoader(
            SingleGroup(), files, queue_size=0, use_tqdm_on_load=False, device="cpu", nogds=True
        )
        try:
            weights = _digest(loader.iterate_weights())
        finally:
            loader.close()
    finally:
        os.open = opened
    return {"weights": weights, "direct": direct}


def runai(folder: str) -> Digests:
    """runai-model-streamer, with the strategy that the environment tells."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in shards(folder)], device="cpu", is_distributed=False)
        return _digest((name, tensor.clone()) for name, tensor in streamer.get_tensors())


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        safetensors_mmap,
        safetensors_pread,
        safetensors_file,
        torch_load,
        transformers,
        fastsafetensors,
        runai,
    )
}

if __name__ == "__main__":
    answer(FUNCTIONS)
