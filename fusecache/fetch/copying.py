"""Bytes, copied out of the store: of blocks that are present, or that are waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fusecache.blocks import block_range
from fusecache.errors import StoreError, UnavailableError
from fusecache.store.object import StoredObject

if TYPE_CHECKING:
    from fusecache.fetch.object_fetch import ObjectFetch
    from fusecache.fetch.service import FetchService


def copy_stored_bytes(
    stored: StoredObject, offset: int, length: int, pieces: Mapping[int, bytes]
) -> bytes | int:
    """The bytes [offset, offset + length), as far as the object has them, of blocks that are present or in
    `pieces`. Does disk I/O. A block that the disk did not give is returned instead, by its number."""
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


def read_when_present(service: FetchService, object_fetch: ObjectFetch, offset: int, length: int) -> bytes:
    """Wait for bytes, at most until the deadline, and copy them out of the store. For control and tests. Raises what
    `FetchService.request_bytes` and the origin raise."""
    done = threading.Event()
    for _ in range(3):
        done.clear()
        waiter = service.request_bytes(object_fetch, offset, length, lambda _waiter: done.set())
        if waiter is not None:
            done.wait()
            if waiter.error is not None:
                raise waiter.error
        data = service.copy_bytes(object_fetch, offset, length, waiter.pieces if waiter else {})
        if data is not None:
            return data
    raise UnavailableError(f"{object_fetch.version.key}: the cached bytes can't be read")
