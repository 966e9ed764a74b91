"""The entries of the tree, and the sources they come from: pure data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from fusecache.types import NodeId, ObjectVersion

ROOT: Final = NodeId(1)
"""The root directory of every mount: FUSE fixes the number."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A file or directory; compared by identity.

    `nodeid` is below 2**62: of a directory it depends on the path alone, of a file on the path and the object
    version, so one nodeid never stands for two contents. `path` is relative to the mountpoint, without a leading
    slash ('' for the root), `name` its last component as the kernel spells it. `source` is the name of the source
    ('' when the source is the root of the mount). `size` is in bytes (0 for a directory), `mtime_ns` in
    nanoseconds since the epoch (of a directory: the newest object below it). `version` is None for a directory.
    """

    nodeid: NodeId
    parent: NodeId
    name: bytes
    path: str
    is_dir: bool
    version: ObjectVersion | None
    source: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class CatalogSource:
    """The origin of a listing. `list_objects` and `stat_object` block and raise OriginError; they run in worker
    threads.

    `name` is the directory below the root that shows the source ('' : the root itself); `identity` is the origin's
    canonical, secret-free identity.
    """

    name: str
    identity: str
    list_objects: Callable[[], Iterator[ObjectVersion]]
    stat_object: Callable[[str], ObjectVersion]
