"""Which files belong together, by their names and sizes: the shards of one model, the files of one adapter. Pure.

A folder may hold one model in many files, or thousands of models (LoRA adapters, most of all) that are loaded at
random: to fetch the neighbours of what is read is right in the first case, and a flood in the second. So shards are
only what says so by its name, or by an index; and what comes along with an adapter, or a small model, are its files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
"""Of weights; the ones that an engine prefers first."""

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
"""The file that an engine reads first of a model: not a companion follows, but the whole model (shard_order.py)."""
_ADAPTER_STEMS = ("adapter_model", "new_embeddings")
MAX_ADAPTER_BYTES = 1 << 30
"""Bytes of weights that are fetched along with an adapter's configuration: the largest have some hundred MiB."""
MAX_SMALL_MODEL_BYTES = 64 << 20
"""Bytes of weights that are fetched along with whatever else is read of their folder: some 50 ms of a fast network."""

_PART_OF = re.compile(r"(.*\D|)\d+(-of-\d+.*)", re.DOTALL)
_NUMBERED = re.compile(
    r"(?:(?:\w+_)?model|consolidated|part|shard|rank|weights)(?:[-_.]*(?:rank|part|shard)?[-_.]*\d+)+\.\w+",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"\d+")


def shard_family(name: str) -> str | None:
    """The same for all shards of one model, of a folder's files; None: the name is not that of a shard.

    Shards say how many there are (`model-00001-of-00003`), or have one of the names that engines number
    (`consolidated.00.pth`, `model-rank-0-part-1.safetensors`). Others that differ in a number are others.
    """
    match = _PART_OF.fullmatch(name)
    if match is not None:
        return f"{match[1]}#{match[2]}"
    return _DIGITS.sub("#", name) if _NUMBERED.fullmatch(name) else None


def companions_of(name: str, sizes: Mapping[str, int]) -> list[str]:
    """The files that a program which reads `name` will read next of its folder, whose files are `sizes` (bytes), in
    that order: the rest of an adapter, or the only weights if they are small."""
    weights = [other for other in sizes if other.lower().endswith(WEIGHT_SUFFIXES)]
    if ADAPTER_CONFIG in sizes:
        found = [ADAPTER_CONFIG, *(_preferred_weights(part, weights) for part in _ADAPTER_STEMS)]
        return [each for each in found if each and each != name and sizes[each] <= MAX_ADAPTER_BYTES]
    if (
        name != MODEL_CONFIG
        and len(weights) == 1
        and weights[0] != name
        and sizes[weights[0]] <= MAX_SMALL_MODEL_BYTES
    ):
        return weights
    return []


def _preferred_weights(stem: str, weights: list[str]) -> str:
    """The weights of this name, of the kind that an engine looks for first; '' for none."""
    return next((stem + suffix for suffix in WEIGHT_SUFFIXES if stem + suffix in weights), "")
