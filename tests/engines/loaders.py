"""Loaders that need no torch, one function each: everything in a folder, as digests by name.

Run as a process by `tests/engines/process.py`. Each function imports its library itself, so that a missing one is
the failure of its own test.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tests.engines.process import answer

Digests = dict[str, str]
_ALIGNMENT = 4096  # of llama.cpp's direct reads: st_blksize
_WORKERS = 8


def digest(tensors: Iterable[tuple[str, Any]]) -> Digests:
    """Name -> hash of shape, type and bytes."""
    found: Digests = {}
    for name, tensor in tensors:
        array = np.ascontiguousarray(tensor)
        assert name not in found, f"{name} twice"
        body = xxhash.xxh3_64_hexdigest(array.reshape(-1).view(np.uint8))
        found[name] = f"{array.dtype} {array.shape} {body}"
    assert found, "nothing was loaded"
    return found


def shards(folder: str) -> list[Path]:
    """The safetensors files of a folder, in order."""
    return sorted(Path(folder).glob("*.safetensors"))


# -- safetensors


def safetensors_mmap(folder: str) -> Digests:
    """safe_open, which maps the file."""
    return digest(_opened(folder))


def safetensors_pread(folder: str) -> Digests:
    """safe_open with the backend that reads tensors in parallel with pread(2)."""
    return digest(_opened(folder, backend="pread"))


def safetensors_file(folder: str) -> Digests:
    """load_file of every shard."""
    from safetensors.numpy import load_file

    return digest(item for file in shards(folder) for item in load_file(file).items())


def safetensors_eager(folder: str) -> Digests:
    """load of all bytes of the file, as the "eager" strategies do."""
    from safetensors.numpy import load

    return digest(item for file in shards(folder) for item in load(file.read_bytes()).items())


def safetensors_ranks(folder: str, ranks: int = 2) -> Digests:
    """Slices of tensors, as each rank of tensor parallelism takes its own."""

    def slices() -> Iterator[tuple[str, np.ndarray]]:
        from safetensors import safe_open

        for rank in range(ranks):
            for file in shards(folder):
                with safe_open(file, framework="numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  not a mapping
                        part = opened.get_slice(name)
                        step = part.get_shape()[0] // ranks
                        yield f"{name} {rank}", part[rank * step : (rank + 1) * step]

    return digest(slices())


def _opened(folder: str, **how: str) -> Iterator[tuple[str, np.ndarray]]:
    from safetensors import safe_open

    for file in shards(folder):
        with safe_open(file, framework="numpy", **how) as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                yield name, opened.get_tensor(name)


# -- SGLang


def sglang(
    folder: str, rank: int = 0, ranks: int = 1, stagger: int = 0, how: str = "mmap", drop: bool = False
) -> Digests:
    """The file accesses of SGLang's DefaultModelLoader; its wheels need CUDA, so this is a replay and not SGLang.

    After buffered_multi_thread_safetensors_weights_iterator (the default) of its model_loader/weight_utils.py:
    8 workers open shards, parse the header and make a tensor of each entry, for a window of 9 shards. With mmap, the
    default, these are views of a private, writable mapping (as torch maps a storage), so that the pages are read
    where they are used: by faults of the one consumer, which takes tensors in the order of their names.
    `how="read"` is --weight-loader-disable-mmap, `drop` --weight-loader-drop-cache-after-load, and `stagger`
    SGLANG_SORT_WEIGHT_FILES: groups of ranks * stagger shards, each rank beginning its own `stagger` shards in.
    """
    order = staggered(shards(folder), rank, ranks, stagger)
    return digest(_sglang_tensors(order, how, drop))


def staggered(files: list[Path], rank: int, ranks: int, stagger: int) -> list[Path]:
    """The order in which a rank reads its files; 0 is the same for all."""
    if not stagger:
        return files
    width = ranks * stagger
    groups = [files[at : at + width] for at in range(0, len(files), width)]
    starts = [rank * stagger % len(group) for group in groups]
    return [file for group, at in zip(groups, starts, strict=True) for file in group[at:] + group[:at]]


def _sglang_tensors(files: list[Path], how: str, drop: bool) -> Iterator[tuple[str, np.ndarray]]:
    waiting = iter(files)
    pending: collections.deque[tuple[Path, concurrent.futures.Future[dict[str, np.ndarray]]]] = (
        collections.deque()
    )
    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:

        def submit() -> None:
            file = next(waiting, None)
            if file is not None:
                pending.append((file, pool.submit(_views, file, how)))

        for _ in range(_WORKERS + 1):
            submit()
        while pending:
            file, future = pending.popleft()
            tensors = future.result()
            submit()
            yield from sorted(tensors.items())
            if drop:
                fd = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def _views(file: Path, how: str) -> dict[str, np.ndarray]:
    """Tensors of one shard that lie in its mapping, or in its bytes."""
    data: Any
    with open(file, "rb") as opened:
        if how == "mmap":
            data = mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            data = opened.read()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        assert entry["dtype"] == "F32"
        start, stop = entry["data_offsets"]
        flat = np.frombuffer(data, np.float32, (stop - start) // 4, begin + start)
        found[name] = flat.reshape(entry["shape"])
    return found


# -- GGUF


def gguf(folder: str) -> Digests:
    """gguf.GGUFReader: its tensors and fields are views of a mapping."""
    from gguf import GGUFReader

    reader = GGUFReader(Path(folder) / "model.gguf")
    fields = {
        f"field {name}": np.frombuffer(repr(field.contents()).encode(), np.uint8)
        for name, field in reader.fields.items()
    }
    return digest([*fields.items(), *((tensor.name, tensor.data) for tensor in reader.tensors)])


def llama_cpp_mmap(folder: str) -> Digests:
    """llama.cpp's default, replayed: a shared mapping, populated when it is made, told that it will be needed."""
    with open(Path(folder) / "model.gguf", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        mapping = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ)
    mapping.madvise(mmap.MADV_WILLNEED)
    return digest([("model.gguf", np.frombuffer(mapping, np.uint8))])


def llama_cpp_read(folder: str) -> Digests:
    """llama.cpp with --no-mmap, replayed: buffered reads of each tensor's range."""
    return digest(_ranges(Path(folder) / "model.gguf", 0))


def llama_cpp_direct(folder: str) -> Digests:
    """llama.cpp with --direct-io, replayed: O_DIRECT reads widened to st_blksize on both sides."""
    return digest(_ranges(Path(folder) / "model.gguf", os.O_DIRECT))


def _ranges(file: Path, flags: int) -> Iterator[tuple[str, np.ndarray]]:
    from gguf import GGUFReader

    wanted = [
        (tensor.name, int(tensor.data_offset), int(tensor.n_bytes)) for tensor in GGUFReader(file).tensors
    ]
    fd = os.open(file, os.O_RDONLY | flags)
    try:
        assert os.fstat(fd).st_blksize == _ALIGNMENT
        size = os.fstat(fd).st_size
        for name, offset, length in wanted:
            at = offset // _ALIGNMENT * _ALIGNMENT
            end = -(-(offset + length) // _ALIGNMENT) * _ALIGNMENT
            page = mmap.mmap(-1, end - at)
            got = 0
            while at + got < min(end, size):
                assert got % _ALIGNMENT == 0, "a read was short before the end of the file"
                got += os.preadv(fd, [memoryview(page)[got:]], at + got)
            yield name, np.frombuffer(page, np.uint8)[offset - at : offset - at + length]
    finally:
        os.close(fd)


# -- tokenizers, ONNX


def tokenizers(folder: str) -> Digests:
    """tokenizer.json through the tokenizers library."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    ids = made.encode("the lazy fox reads weights").ids
    return digest([("ids", np.array(ids)), ("vocabulary", np.array(sorted(made.get_vocab())))])


def sentencepiece(folder: str) -> Digests:
    """tokenizer.model through sentencepiece."""
    from sentencepiece import SentencePieceProcessor

    made = SentencePieceProcessor(model_file=str(Path(folder) / "tokenizer.model"))
    pieces = [made.id_to_piece(number) for number in range(made.get_piece_size())]
    return digest([("ids", np.array(made.encode("the lazy fox"))), ("pieces", np.array(pieces))])


def onnx(folder: str) -> Digests:
    """onnx.load with the tensors in a file of their own, and the checker, which looks at that file, too."""
    import onnx
    from onnx import numpy_helper

    file = Path(folder) / "model.onnx"
    onnx.checker.check_model(str(file))
    model = onnx.load(file)
    return digest((tensor.name, numpy_helper.to_array(tensor)) for tensor in model.graph.initializer)


# -- anything


def files(folder: str) -> Digests:
    """Every byte of every file, names as they are below the folder."""
    root = Path(folder)
    found = sorted(file for file in root.rglob("*") if file.is_file())
    return digest((str(file.relative_to(root)), np.fromfile(file, np.uint8)) for file in found)


def hub(cache: str, repository: str) -> dict[str, Any]:
    """huggingface_hub offline, with a cache that can't be written: the folder of the snapshot, and what it holds."""
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache

    folder = snapshot_download(repository, cache_dir=cache, local_files_only=True)
    config = hf_hub_download(repository, "config.json", cache_dir=cache, local_files_only=True)
    assert try_to_load_from_cache(repository, "config.json", cache_dir=cache) == config
    scanned = scan_cache_dir(cache)
    return {
        "folder": folder,
        "files": files(folder),
        "scanned": sorted(repo.repo_id for repo in scanned.repos),
        "warnings": [str(warning) for warning in scanned.warnings],
    }


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        safetensors_mmap,
        safetensors_pread,
        safetensors_file,
        safetensors_eager,
        safetensors_ranks,
        sglang,
        gguf,
        llama_cpp_mmap,
        llama_cpp_read,
        llama_cpp_direct,
        tokenizers,
        sentencepiece,
        onnx,
        files,
        hub,
    )
}

if __name__ == "__main__":
    answer(FUNCTIONS)
