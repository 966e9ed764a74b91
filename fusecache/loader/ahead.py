"""The shards behind the one that is being read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from fusecache.errors import FusecacheError
from fusecache.loader import plan
from fusecache.loader.companions import family
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)


def shards_behind(
    version: ObjectVersion,
    siblings: Sequence[ObjectVersion],
    read_index: Callable[[ObjectVersion], bytes],
    budget: int,
) -> list[ObjectVersion]:
    """The versions to fetch after this one, in order, as far as `budget` bytes go.

    `siblings` may hold more than its folder. An index that `read_index` can't read is done without.
    """
    if not plan.is_config(version.key) and not _is_one_of_many(version, siblings):
        return []
    folder, _, name = version.key.rpartition("/")
    versions = {
        other.key.rpartition("/")[2]: other for other in siblings if other.key.rpartition("/")[0] == folder
    }
    order: list[str] = []
    index = plan.index_for(name, list(versions))
    if index is not None and versions[index].size <= plan.INDEX_LIMIT:
        try:
            order = plan.index_order(read_index(versions[index]))
        except FusecacheError as error:
            _log.warning("%s can't be read, shards are fetched by name: %s", index, error)
    behind = []
    for other in plan.following(name, list(versions), order):
        budget -= versions[other].size
        if budget < 0:
            break
        behind.append(versions[other])
    return behind


def _is_one_of_many(version: ObjectVersion, siblings: Sequence[ObjectVersion]) -> bool:
    """Whether its name, or maybe an index, says that it is a shard; quick, since it may be one of thousands that have
    nothing to do with each other."""
    name = version.key.rpartition("/")[2]
    return family(name) is not None or any(other.key.endswith(plan.INDEX_SUFFIX) for other in siblings)
