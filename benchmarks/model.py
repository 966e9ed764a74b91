"""Makes a model as a hub has it: safetensors shards, their index and a config, with random content.

Random, since a constant would flatter anything that compresses, deduplicates or mixes up offsets.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

MIB = 1 << 20
LAYER_MIB = 32  # a 4096 x 4096 matrix of 16-bit numbers, the common size of a layer of an 8B model


@dataclass(frozen=True)
class Model:
    """A model on the local disk: `shards` in the order of the index, `sha256` of every file by its name."""

    directory: Path
    shards: tuple[str, ...]
    sha256: dict[str, str]
    size: int
    """Bytes of all shards."""


def make_model(directory: Path, *, shards: int, shard_mib: int, seed: int = 0) -> Model:
    """Write `shards` files of about `shard_mib` MiB each, the index and the config into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    names = tuple(f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards))
    weights: dict[str, str] = {}
    for number, name in enumerate(names):
        tensors = _tensors(np.random.default_rng((seed, number)), number, shard_mib * MIB)
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weights.update(dict.fromkeys(tensors, name))
    size = sum((directory / name).stat().st_size for name in names)
    index = {"metadata": {"total_size": size}, "weight_map": weights}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float16"}))
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return Model(directory, names, {path.name: sha256_of(path) for path in files}, size)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(random: np.random.Generator, shard: int, size: int) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    left = size
    layer = 0
    while left > 0:
        part = min(left, LAYER_MIB * MIB)
        values = np.frombuffer(random.bytes(part), dtype=np.float16)
        columns = 4096 if values.size % 4096 == 0 else 1
        tensors[f"model.layers.{shard * 1000 + layer}.weight"] = values.reshape(-1, columns)
        tensors[f"model.layers.{shard * 1000 + layer}.norm"] = values[:4096].copy()
        left -= part
        layer += 1
    return tensors
