"""The nouns every room shares: pure data, no I/O, neither trio nor fsspec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NewType

import xxhash

NodeId = NewType("NodeId", int)
"""The number by which the kernel names an inode of a mount; its bits are laid out in fusecache_mount.kernel.nodeids."""

ObjectId = NewType("ObjectId", str)
"""32 hex digits that name one object version in the store."""

NODE_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""The name of a node of a cluster, or of a tenant."""


@dataclass(frozen=True)
class ObjectVersion:
    """One immutable version of one object.

    `origin` is the canonical identity of where it comes from (scheme, endpoint, bucket, prefix; never a
    credential) and `key` the path below it, '/'-separated, without a leading slash. `etag` is the opaque
    token that conditional reads are made with: an ETag for S3 and HTTP, a generation for GCS, '' where the
    origin has none. `size` is in bytes, `mtime_ns` in nanoseconds since the epoch.
    """

    origin: str
    key: str
    etag: str
    size: int
    mtime_ns: int

    @cached_property
    def id(self) -> ObjectId:
        """Stable across processes and machines: two versions never share it (128-bit hash)."""
        text = "\0".join((self.origin, self.key, self.etag, str(self.size), str(self.mtime_ns)))
        return ObjectId(xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape")))
