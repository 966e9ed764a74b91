"""Which files an engine will read next. Pure.

A model is what `model.safetensors.index.json` names (PyTorch's index, too), in its order, or else the files whose
names say that they are shards of one (companions.shard_family), in that of the names. After the shard that is being
read come those behind it, then, round about, those before it, which another rank may want. A program that reads the
folder's config.json is about to load all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from fusecache.prefetch.models.companions import MODEL_CONFIG, WEIGHT_SUFFIXES, shard_family
from fusecache.types import ObjectVersion

INDEX_SUFFIX = ".index.json"
MAX_INDEX_BYTES = 64 << 20
"""Bytes; the largest real index (a model of a few hundred thousand tensors) has some 40 MiB."""

_DIGITS = re.compile(r"(\d+)")
_COUNTED_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which `part-10` comes after `part-2`."""
    parts = _DIGITS.split(name)
    return tuple((1, int(part)) if part.isdigit() else (0, part) for part in parts)


def is_shard(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def is_config(name: str) -> bool:
    """Whether a program that reads a file of this name is about to load the model beside it."""
    return name == MODEL_CONFIG or name.endswith("/" + MODEL_CONFIG)


def folder_of(version: ObjectVersion) -> str:
    """The folder of an object, the same for two objects only if they have one origin."""
    return f"{version.origin}/{version.key.rpartition('/')[0]}"


def shard_suffix(name: str) -> str:
    """The kind of shard a name belongs to, '' for none."""
    return next((suffix for suffix in WEIGHT_SUFFIXES if name.lower().endswith(suffix)), "")


def find_index(name: str, siblings: Sequence[str]) -> str | None:
    """The index file among `siblings` that orders the shards of `name`'s kind; of a config: those that are loaded."""
    suffix = _preferred_suffix(siblings) if is_config(name) else shard_suffix(name)
    found = [other for other in siblings if other.endswith(suffix + INDEX_SUFFIX)] if suffix else []
    return min(found, key=len, default=None)


def shards_in_index(text: bytes) -> list[str]:
    """File names of an index in the order of their first tensor; [] if it is no such index."""
    try:
        found = json.loads(text)["weight_map"]
        names = [value for value in found.values() if isinstance(value, str)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return list(dict.fromkeys(names))


def files_in_folder(version: ObjectVersion, siblings: Sequence[ObjectVersion]) -> dict[str, ObjectVersion]:
    """Those of `siblings` that lie in the folder of this one, by name."""
    folder = version.key.rpartition("/")[0]
    parts = [(other.key.rpartition("/"), other) for other in siblings]
    return {name: other for (parent, _, name), other in parts if parent == folder}


def is_announcement(name: str) -> bool:
    """Whether the reading of a file of this name says that shards beside it will be looked at next."""
    return is_config(name) or name.endswith(INDEX_SUFFIX)


def shard_group(name: str) -> str:
    """Two shards of one folder belong to one model if this is the same for both."""
    return shard_family(name) or name


def shards_of_model(name: str, siblings: Sequence[str]) -> list[str]:
    """The shards that make up one model with this one, sorted; after its index or config: those that an engine will
    take, the first kind of WEIGHT_SUFFIXES that is there."""
    shards = [other for other in siblings if is_shard(other)]
    if is_shard(name):
        group = shard_group(name)
        return sorted(other for other in shards if shard_group(other) == group)
    for suffix in WEIGHT_SUFFIXES:
        named = f"{suffix}{INDEX_SUFFIX}"
        found = [other for other in shards if shard_suffix(other) == suffix]
        if found and (is_config(name) or name.endswith(named)):
            largest = max(
                found, key=lambda other: sum(shard_group(each) == shard_group(other) for each in found)
            )
            return sorted(other for other in found if shard_group(other) == shard_group(largest))
    return []


def shards_following(name: str, siblings: Sequence[str], index: Sequence[str] = ()) -> list[str]:
    """The shards to fetch after `name`, in order. `siblings` are the names of its folder, `index` the order
    that an index file gives, if there is one that names it."""
    present = set(siblings)
    if is_config(name):
        return [other for other in index if other in present] or _shards_by_usual_names(siblings)
    if not is_shard(name):
        return []
    if name in index:
        order = [other for other in index if other in present]
    else:
        of = shard_family(name)
        order = sorted((other for other in present if of and shard_family(other) == of), key=natural_key)
    if name not in order:
        return []
    at = order.index(name)
    return order[at + 1 :] + order[:at]


def _preferred_suffix(siblings: Sequence[str]) -> str:
    """The kind of shards that engines take where there are several."""
    return next(
        (suffix for suffix in (".safetensors", ".bin") if _shards_by_usual_names(siblings, suffix)), ""
    )


def _shards_by_usual_names(siblings: Sequence[str], *suffixes: str) -> list[str]:
    """The shards of a folder's model by their usual names: files of other names may be another variant of it."""
    for suffix in suffixes or (".safetensors", ".bin"):
        numbered = [name for name in siblings if name.endswith(suffix) and _COUNTED_SHARD.search(name)]
        whole = [name for name in (f"model{suffix}", f"pytorch_model{suffix}") if name in siblings]
        if numbered or whole:
            return whole or sorted(numbered, key=natural_key)
    return []
