"""Which files an engine will read next. Pure.

A model is a folder of shards: the order of `model.safetensors.index.json` (of PyTorch's index, too), or that
of the names. After the shard that is being read come those behind it, then, round about, those before it,
which another rank may want.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

SHARD_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
INDEX_SUFFIX = ".index.json"
INDEX_LIMIT = 64 << 20
"""Bytes; the largest real index (a model of a few hundred thousand tensors) has some 40 MiB."""

_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which `part-10` comes after `part-2`."""
    parts = _DIGITS.split(name)
    return tuple((1, int(part)) if part.isdigit() else (0, part) for part in parts)


def is_shard(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return name.lower().endswith(SHARD_SUFFIXES)


def suffix_of(name: str) -> str:
    """The kind of shard a name belongs to, '' for none."""
    return next((suffix for suffix in SHARD_SUFFIXES if name.lower().endswith(suffix)), "")


def index_for(name: str, siblings: Sequence[str]) -> str | None:
    """The index file among `siblings` that orders the shards of `name`'s kind."""
    suffix = suffix_of(name)
    found = [other for other in siblings if other.endswith(suffix + INDEX_SUFFIX)] if suffix else []
    return min(found, key=len, default=None)


def index_order(text: bytes) -> list[str]:
    """File names of an index in the order of their first tensor; [] if it is no such index."""
    try:
        found = json.loads(text)["weight_map"]
        names = [value for value in found.values() if isinstance(value, str)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return list(dict.fromkeys(names))


def following(name: str, siblings: Sequence[str], index: Sequence[str] = ()) -> list[str]:
    """The shards to fetch after `name`, in order. `siblings` are the names of its folder, `index` the order
    that an index file gives, if there is one that names it."""
    if not is_shard(name):
        return []
    present = set(siblings)
    if name in index:
        order = [other for other in index if other in present]
    else:
        suffix = suffix_of(name)
        order = sorted((other for other in present if suffix_of(other) == suffix), key=natural_key)
    if name not in order:
        return []
    at = order.index(name)
    return order[at + 1 :] + order[:at]
