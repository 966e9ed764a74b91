"""Broken models: an engine is told on the mount what it would be told on a local disk, and nothing hangs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines import models
from tests.engines.library import Library, Mounts
from tests.engines.process import Engine, EngineError
from tests.support.mounting import needs_fuse

pytestmark = needs_fuse

_SHARD = "model-00002-of-00003.safetensors"
_LIMIT = 100_000_000
"""Bytes of the longest header that safetensors takes."""
_TENSOR = {"dtype": "F32", "shape": [256, 256], "data_offsets": [0, 262144]}


def outcome(call: Callable[[], object], folder: Path) -> tuple[str, object]:
    """The result of a call, or the type and text of its error, the place of the files left out."""
    try:
        return "result", call()
    except EngineError as error:
        return error.kind, error.text.replace(str(folder), "FOLDER")


def cut(name: str, keep: float | int) -> Callable[[Path], None]:
    """Shorten a file: to a share of its size, or to so many bytes."""

    def work(folder: Path) -> None:
        file = folder / name
        data = file.read_bytes()
        file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])

    return work


def header(
    told: int | None, entries: object, data: bytes = bytes(262144), name: str = _SHARD
) -> Callable[[Path], None]:
    """Replace a shard by one with this header, whose length is told as it is, or as `told`."""

    def work(folder: Path) -> None:
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        begin = (len(text) if told is None else told).to_bytes(8, "little")
        (folder / name).write_bytes(begin + text + data)

    return work


_OVER = {"a": _TENSOR, "b": _TENSOR | {"data_offsets": [1000, 263144]}}
_SAFETENSORS: dict[str, Callable[[Path], None]] = {
    "truncated": cut(_SHARD, 0.5),
    "truncated-in-the-header": cut(_SHARD, 100),
    "truncated-in-the-length": cut(_SHARD, 5),
    "empty": cut(_SHARD, 0),
    "length-beyond-the-end": header(2_000_000, {"a": _TENSOR}),
    "length-of-exabytes": header(2**63 + 1, {"a": _TENSOR}),
    "length-over-100-mb": header(_LIMIT + 1, {"a": _TENSOR}),
    "no-json": header(None, b"this is not JSON"),
    "offsets-beyond-the-end": header(None, {"a": _TENSOR | {"data_offsets": [0, 1 << 40]}}),
    "offsets-that-overlap": header(None, _OVER),
    "shape-that-does-not-fit": header(None, {"a": _TENSOR | {"shape": [256, 255]}}),
    "data-too-short": header(None, {"a": _TENSOR}, bytes(1000)),
}


@pytest.fixture(scope="module")
def lies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, each with one shard that is broken."""
    root = tmp_path_factory.mktemp("lies")
    for name, breaks in _SAFETENSORS.items():
        breaks(models.shards(root / name, 3, rows=64))
    return root


@pytest.mark.parametrize(("how", "mode"), [("mmap", "daemon"), ("pread", "kernel"), ("eager", "kernel")])
def test_safetensors_that_lie(how: str, mode: str, mounts: Mounts, loaders: Engine, lies: Path) -> None:
    """The error is that of a local disk, and the other shards can be read."""
    served = mounts[mode].serve(f"lies-{how}", lies)
    for name in _SAFETENSORS:
        local, folder = lies / name, served / name
        results = [
            outcome(lambda at=at: loaders.call(f"safetensors_{how}", folder=str(at)), at)
            for at in (local, folder)
        ]
        assert results[0] == results[1], name
        assert results[0][0] in ("SafetensorError", "ValueError"), name
        for shard in local.glob("*.safetensors"):
            assert (folder / shard.name).read_bytes() == shard.read_bytes()


def test_a_header_of_100_mb(plain: Library, loaders: Engine, tmp_path: Path) -> None:
    """As long as safetensors allows it; a byte more is "length-over-100-mb" above."""
    local = models.shards(tmp_path / "model", 1, rows=64)
    text = json.dumps({"a": _TENSOR}).encode()
    header(None, text + b" " * (_LIMIT - len(text)), name="model-00001-of-00001.safetensors")(local)
    wanted = loaders.call("safetensors_mmap", folder=str(local))
    folder = plain.serve("header", local)
    cold, warm = plain.cold_and_warm(folder, lambda path: loaders.call("safetensors_mmap", folder=path))
    assert cold == warm == wanted


@pytest.mark.parametrize(
    "index",
    [
        b"\n",
        b"{",
        b"[1, 2]",
        b'{"weight_map": 7}',
        b'{"weight_map": {"a": ["b"], "c": 5, "d": null}}',
        json.dumps(
            {"weight_map": {"a": "missing.safetensors", "b": "../../etc/passwd", "c": "/etc/passwd"}}
        ).encode(),
        json.dumps(
            {"weight_map": {str(number): f"{number}.safetensors" for number in range(100_000)}}
        ).encode(),
    ],
    ids=["empty", "truncated", "a-list", "a-number", "no-names", "missing-and-outside", "100000-missing"],
)
def test_an_index_that_lies_harms_no_load(
    index: bytes, request: pytest.FixtureRequest, plain: Library, loaders: Engine, tmp_path: Path
) -> None:
    """The mount itself reads the index for its plan. A loader that does not read it does not feel it."""
    local = models.shards(tmp_path / "model", 3, rows=64)
    (local / "model.safetensors.index.json").write_bytes(index)
    folder = plain.serve(f"index-{request.node.callspec.id}", local)
    wanted = loaders.call("files", folder=str(local))
    cold, warm = plain.cold_and_warm(folder, lambda path: loaders.call("files", folder=path))
    assert cold == warm == wanted


_OTHERS: dict[str, tuple[str, Callable[[Path], Path], Callable[[Path], None]]] = {
    "gguf-truncated": ("gguf", models.gguf, cut("model.gguf", 0.6)),
    "gguf-truncated-in-the-metadata": ("gguf", models.gguf, cut("model.gguf", 200)),
    "gguf-empty": ("gguf", models.gguf, cut("model.gguf", 0)),
    "gguf-empty-populated": ("llama_cpp_mmap", models.gguf, cut("model.gguf", 0)),
    "onnx-data-missing": ("onnx", models.onnx, lambda folder: (folder / "model.onnx.data").unlink()),
    "onnx-data-truncated": ("onnx", models.onnx, cut("model.onnx.data", 0.5)),
    "onnx-truncated": ("onnx", models.onnx, cut("model.onnx", 0.5)),
    "tokenizer-truncated": ("tokenizers", models.tokenizer, cut("tokenizer.json", 0.5)),
    "tokenizer-missing": (
        "tokenizers",
        models.tokenizer,
        lambda folder: (folder / "tokenizer.json").unlink(),
    ),
    "sentencepiece-truncated": ("sentencepiece", models.sentencepiece, cut("tokenizer.model", 0.5)),
    "sentencepiece-empty": ("sentencepiece", models.sentencepiece, cut("tokenizer.model", 0)),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_other_formats_that_are_broken(name: str, plain: Library, loaders: Engine, tmp_path: Path) -> None:
    loader, make, breaks = _OTHERS[name]
    local = make(tmp_path / "model")
    breaks(local)
    folder = plain.serve(name, local)
    results = [outcome(lambda at=at: loaders.call(loader, folder=str(at)), at) for at in (local, folder)]
    assert results[0] == results[1]
    assert results[0][0] != "result"
