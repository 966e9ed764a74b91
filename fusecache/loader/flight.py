"""One flight: bring a run of blocks into the store and wake each block's waiters as it lands.

Runs in a worker thread; all bulk work (receiving, hashing, writing) lets the GIL go. Memory: one chunk of the
origin's, and one block when the store can't take it. Without space, or with a broken disk, the blocks that
somebody waits for are handed over from memory, and nobody notices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import xxhash

from fusecache.blocks import block_bytes
from fusecache.errors import (
    FusecacheError,
    NotFoundError,
    StoreError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.loader.interface import Again, Expect, Supplier
from fusecache.loader.load import Job, ObjectLoad

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)


class Tower(Protocol):
    """What a flight tells the loader. All methods take the loader's lock."""

    def land(self, load: ObjectLoad, block: int, piece: bytes | None) -> None:
        """The block is in the store, or only in `piece`."""

    def put_off(self, load: ObjectLoad, blocks: range) -> None:
        """Another process fetches these: look again soon."""

    def wanted(self, load: ObjectLoad, blocks: range) -> range:
        """The shortest prefix of the blocks that holds all that somebody waits for."""


def fly(
    job: Job, supplier: Supplier, tower: Tower, *, deadline: float, cancelled: Callable[[], bool]
) -> tuple[list[int], FusecacheError | None]:
    """Do a job; returns its blocks that did not land though nothing failed, or what failed."""
    load = job.load
    try:
        if job.verify:
            return verify(load, job.blocks, tower), None
        left = fetch(
            load, job.blocks, supplier, tower, deadline=deadline, cancelled=cancelled, urgent=job.urgent
        )
        return left, None
    except NotFoundError as error:
        gone = VersionChangedError(f"{load.version.key} was deleted at the origin: open it again")
        gone.__cause__ = error
        return [], gone
    except FusecacheError as error:
        return [], error
    except Exception as error:
        _log.exception("a flight failed")
        return [], UnavailableError(f"{load.version.key}: {type(error).__name__}: see the log")


def verify(load: ObjectLoad, blocks: range, tower: Tower) -> list[int]:
    """Hash blocks that an earlier run left in the data file; returns those that were bad or are gone."""
    bad = []
    for block in blocks:
        if load.stored.verify(block):
            tower.land(load, block, None)
        else:
            bad.append(block)
    return bad


def fetch(
    load: ObjectLoad,
    blocks: range,
    supplier: Supplier,
    tower: Tower,
    *,
    deadline: float,
    cancelled: Callable[[], bool],
    urgent: bool = True,
) -> list[int]:
    """Fetch blocks; returns those that did not land though nothing failed.

    `deadline` is a time.monotonic(). Raises what Supplier.supply raises, and StoreError when the store failed:
    blocks that landed before that stay.
    """
    with load.stored.claim(blocks) as granted:
        if len(granted) < len(blocks):
            tower.put_off(load, range(granted.stop, blocks.stop))
            blocks = granted
        if not blocks:
            return []
        if any(load.stored.unverified(block) or load.stored.present(block) for block in blocks):
            return list(blocks)  # another process brought them while we asked
        reserved = load.bytes_of(blocks)
        if load.keeps(blocks.start) and load.stored.reserve(reserved):
            sink: _Sink = _StoreSink(load, tower, reserved)
            left: list[int] = []
        else:
            asked, blocks = blocks, tower.wanted(load, blocks)
            left = list(range(blocks.stop, asked.stop))
            sink = _Sink(load, tower)
        if blocks:
            try:
                items = supplier.supply(
                    load.version,
                    load.source,
                    blocks,
                    load.stored.block_size,
                    deadline=deadline,
                    cancelled=cancelled,
                    urgent=urgent,
                )
                _receive(load, blocks, items, sink)
            finally:
                sink.close()
        return left


def _receive(load: ObjectLoad, blocks: range, items: Iterator[Buffer | Expect | Again], sink: _Sink) -> None:
    block_size, size = load.stored.block_size, load.version.size
    block = blocks.start
    offset = block * block_size
    room = block_bytes(block, size, block_size)
    expected: Expect | None = None
    for item in items:
        if isinstance(item, Expect | Again):
            expected = item if isinstance(item, Expect) else None
            if offset > block * block_size:
                sink.reset()
                offset = block * block_size
                room = block_bytes(block, size, block_size)
            continue
        with memoryview(item) as view:
            sink.write(offset, view)
            at = 0
            while at < len(view):
                part = view[at : at + room]
                sink.add(part)
                at += len(part)
                room -= len(part)
                offset += len(part)
                if room:
                    continue
                if expected is not None and not sink.matches(expected.checksum):
                    expected.bad = True
                    sink.reset()
                    offset = block * block_size
                    room = block_bytes(block, size, block_size)
                    break
                expected = None
                sink.finish(block)
                block += 1
                if block < blocks.stop:
                    room = block_bytes(block, size, block_size)


class _Sink:
    """Keeps the blocks in memory for their waiters."""

    def __init__(self, load: ObjectLoad, tower: Tower) -> None:
        self._load = load
        self._tower = tower
        self._block = bytearray()

    def write(self, offset: int, data: memoryview) -> None:
        """Bytes for the data file."""

    def add(self, data: memoryview) -> None:
        """The next bytes of the current block."""
        self._block += data

    def finish(self, block: int) -> None:
        """All bytes of the block were added."""
        piece, self._block = bytes(self._block), bytearray()
        self._tower.land(self._load, block, piece)

    def matches(self, checksum: int) -> bool:
        """Whether the bytes of the current block have this xxh3_64."""
        digest = xxhash.xxh3_64()
        digest.update(self._block)
        return (digest.intdigest() or 1) == checksum

    def reset(self) -> None:
        """Begin the current block anew."""
        self._block = bytearray()

    def close(self) -> None:
        """The flight is over."""


class _StoreSink(_Sink):
    """Writes the blocks into the store, whose space was reserved."""

    def __init__(self, load: ObjectLoad, tower: Tower, reserved: int) -> None:
        super().__init__(load, tower)
        self._reserved = reserved
        self._digest = xxhash.xxh3_64()

    def write(self, offset: int, data: memoryview) -> None:
        self._load.stored.write(offset, data)

    def add(self, data: memoryview) -> None:
        self._digest.update(data)

    def matches(self, checksum: int) -> bool:
        return (self._digest.intdigest() or 1) == checksum

    def reset(self) -> None:
        self._digest.reset()

    def finish(self, block: int) -> None:
        stored = self._load.stored
        checksum = self._digest.intdigest()
        self._digest.reset()
        self._reserved -= block_bytes(block, self._load.version.size, stored.block_size)
        stored.commit(block, checksum)
        if not stored.present(block):
            raise StoreError(f"{self._load.version.key}: the cache gave the object up")
        self._tower.land(self._load, block, None)

    def close(self) -> None:
        if self._reserved > 0:
            self._load.stored.unreserve(self._reserved)
