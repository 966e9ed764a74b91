"""Bytes, copied out of the store."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fusecache.blocks import block_range
from fusecache.errors import StoreError
from fusecache.store.object import StoredObject


def copy_stored_bytes(
    stored: StoredObject, offset: int, length: int, pieces: Mapping[int, bytes]
) -> bytes | int:
    """The bytes [offset, offset + length), as far as the object has them, of blocks that are present or in `pieces`.
    Does disk I/O. If the disk did not give a block, its number is returned instead. Raises nothing."""
    size, block_size = stored.version.size, stored.block_size
    parts: list[bytes | memoryview] = []
    for block in block_range(offset, length, size, block_size):
        start = max(offset, block * block_size)
        stop = min(offset + length, size, (block + 1) * block_size)
        if block in pieces:
            part: bytes | memoryview = memoryview(pieces[block])[
                start - block * block_size : stop - block * block_size
            ]
        else:
            try:
                part = os.pread(stored.fileno(), stop - start, start)
            except (OSError, StoreError):
                part = b""
        if len(part) != stop - start:
            return block
        parts.append(part)
    return b"".join(parts)
