"""The loads whose time is taken: each brings all weights of a folder into this process, as an engine would.

A load runs in a process of its own, which says when its imports are done and then waits for the start, so that several
ranks begin at the same moment. Every byte is copied out of the file's pages into memory that exists already: a
mapping that nobody touches loads nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchmarkError, python_module

TIMEOUT = 240.0
_IMPORTS = 120.0
"""Seconds for the imports: torch from a cold disk takes its time."""
INDEX = "model.safetensors.index.json"
_DIGITS = re.compile(r"(\d+)")


def shards_of(folder: Path) -> list[Path]:
    """The shards that the index names, in order; the files of weights by name where there is no index."""
    index = folder / INDEX
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    else:
        names = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".gguf")}
    return [folder / name for name in sorted(names, key=_natural)]


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in _DIGITS.split(name)]


def sparse(names: Sequence[str]) -> list[str]:
    """The tensors of 30 % of the layers, spread over the file: what one rank of several reads of a model with experts.
    By layers, since every other tensor is a norm of some KiB."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    wanted = {layer for at, layer in enumerate(layers) if at % 10 in (1, 4, 7)}
    return [name for name in names if name.rpartition(".")[0] in wanted]


class _Sink:
    """Memory that tensors are copied into, one after the other; it grows before the clock starts, if told how far."""

    def __init__(self, room: int) -> None:
        import torch

        self._torch = torch
        self._room = torch.zeros(room, dtype=torch.uint8)

    def take(self, tensor: Any) -> int:
        """Copy a tensor in; returns its bytes."""
        plain = tensor.reshape(-1).view(self._torch.uint8)
        if plain.numel() > self._room.numel():
            self._room = self._torch.zeros(plain.numel(), dtype=self._torch.uint8)
        self._room[: plain.numel()].copy_(plain)
        return int(plain.numel())


_ROOM = 64 << 20


def _safetensors(files: Sequence[Path], sink: _Sink, **how: Any) -> int:
    from safetensors import safe_open

    total = 0
    for file in files:
        with safe_open(file, framework="pt", device="cpu", **how) as handle:
            for name in handle.offset_keys():
                total += sink.take(handle.get_tensor(name))
    return total


def _lazy_torch(files: Sequence[Path], sink: _Sink) -> int:
    return _safetensors(files, sink)


def _pread_torch(files: Sequence[Path], sink: _Sink) -> int:
    return _safetensors(files, sink, backend="pread")


def _sparse_torch(files: Sequence[Path], sink: _Sink) -> int:
    from safetensors import safe_open

    total = 0
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as handle:
            for name in sparse(handle.offset_keys()):
                total += sink.take(handle.get_tensor(name))
    return total


def _lazy_numpy(files: Sequence[Path], _sink: _Sink) -> int:
    from safetensors import safe_open

    total = 0
    for file in files:
        with safe_open(file, framework="numpy") as handle:
            for name in handle.offset_keys():
                total += handle.get_tensor(name).nbytes
    return total


def _eager_torch(files: Sequence[Path], sink: _Sink) -> int:
    from safetensors.torch import load

    return sum(sink.take(tensor) for file in files for tensor in load(file.read_bytes()).values())


def _torch_load(files: Sequence[Path], sink: _Sink, mmap: bool = False) -> int:
    import torch

    total = 0
    for file in files:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        total += sum(sink.take(tensor) for tensor in found.values())
    return total


def _torch_load_mmap(files: Sequence[Path], sink: _Sink) -> int:
    return _torch_load(files, sink, mmap=True)


def _runai(files: Sequence[Path], sink: _Sink) -> int:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files])
        return sum(sink.take(tensor) for _, tensor in streamer.get_tensors())


def _fastsafetensors(files: Sequence[Path], sink: _Sink) -> int:
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    # As on a mount, also from a local tmpfs: there it would read buffered, and another way of reading be compared.
    os.environ.setdefault("FASTSAFETENSORS_ODIRECT", "1")
    names = [str(file) for file in files]
    loader = ParallelLoader(
        pg=SingleGroup(), hf_weights_files=names, use_tqdm_on_load=False, device="cpu", nogds=True
    )
    try:
        return sum(sink.take(tensor) for _, tensor in loader.iterate_weights())
    finally:
        loader.close()


def _gguf(files: Sequence[Path], sink: _Sink) -> int:
    import torch
    from gguf import GGUFReader

    total = 0
    for file in files:
        for tensor in GGUFReader(file).tensors:
            # The reader maps the file for reading only, which torch would warn of; nothing is written.
            total += sink.take(torch.frombuffer(tensor.data, dtype=torch.uint8))
    return total


LOADERS: dict[str, tuple[str, str, tuple[str, ...], Callable[[Sequence[Path], _Sink], int]]] = {
    "safetensors": ("safetensors lazy, torch", "safetensors", ("safetensors.torch",), _lazy_torch),
    "safetensors-numpy": ("safetensors lazy, numpy", "safetensors", ("safetensors.numpy",), _lazy_numpy),
    "safetensors-pread": ("safetensors pread", "safetensors", ("safetensors.torch",), _pread_torch),
    "safetensors-eager": ("safetensors eager read", "safetensors", ("safetensors.torch",), _eager_torch),
    "torch": ("torch.load", "pt", ("torch",), _torch_load),
    "torch-mmap": ("torch.load, mmap", "pt", ("torch",), _torch_load_mmap),
    "runai": ("runai-model-streamer", "safetensors", ("runai_model_streamer",), _runai),
    "fastsafetensors": ("fastsafetensors", "safetensors", ("fastsafetensors",), _fastsafetensors),
    "gguf": ("gguf", "gguf", ("gguf",), _gguf),
    "sparse": ("safetensors lazy, 30 % of the tensors", "safetensors", ("safetensors.torch",), _sparse_torch),
}
"""Name -> title, format of the files, what it imports, the load itself."""


def missing(name: str) -> str:
    """The module that this load lacks here; empty: none."""
    for module in ("torch", *LOADERS[name][2]):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return module.partition(".")[0]
    return ""


def timed(name: str, folder: Path, *, ranks: int = 1, timeout: float = TIMEOUT) -> tuple[float, int]:
    """Seconds until the last of `ranks` processes that begin at the same moment has everything, and the bytes that each
    loaded. Raises BenchmarkError."""
    children = [
        subprocess.Popen(
            python_module(__name__, name, str(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(ranks)
    ]
    try:
        for child in children:
            _await_ready(child, name)
        began = time.monotonic()
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        ends, sizes = [], set()
        for child in children:
            told = _result(child, name, began + timeout)
            ends.append(float(told["end"]))
            sizes.add(int(told["bytes"]))
        if len(sizes) != 1:
            raise BenchmarkError(f"{name}: the ranks loaded different numbers of bytes: {sorted(sizes)}")
        return max(ends) - began, sizes.pop()
    finally:
        for child in children:
            child.kill()
            child.wait()


def _await_ready(child: subprocess.Popen[str], name: str) -> None:
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], _IMPORTS)[0]:
        raise BenchmarkError(f"{name}: its imports took more than {_IMPORTS:g} s")
    if child.stdout.readline().strip() != "ready":
        raise BenchmarkError(f"{name}: {_last_line(child.communicate(timeout=10)[1])}")


def _result(child: subprocess.Popen[str], name: str, until: float) -> dict[str, Any]:
    try:
        printed, errors = child.communicate(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{name}: not loaded within its time") from None
    if child.returncode != 0:
        raise BenchmarkError(f"{name}: {_last_line(errors)}")
    return dict(json.loads(printed.strip().splitlines()[-1]))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"


def main(name: str, folder: str) -> None:
    """Entry point of the loading process."""
    _, _, modules, load = LOADERS[name]
    for module in modules:
        importlib.import_module(module)
    sink = _Sink(_ROOM)
    print("ready", flush=True)
    sys.stdin.readline()
    total = load(shards_of(Path(folder)), sink)
    print(json.dumps({"end": time.monotonic(), "bytes": total}))
