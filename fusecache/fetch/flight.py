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

from fusecache.blocks import block_length
from fusecache.errors import (
    FusecacheError,
    NotFoundError,
    StoreError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.fetch.interface import BlockRestart, BlockSource, ExpectedChecksum
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)


class FlightListener(Protocol):
    """What a flight tells the loader. All methods take the loader's lock."""

    def block_arrived(self, object_fetch: ObjectFetch, block: int, piece: bytes | None) -> None:
        """The block is in the store, or only in `piece`."""

    def blocks_claimed_elsewhere(self, object_fetch: ObjectFetch, blocks: range) -> None:
        """Another process fetches these: look again soon."""

    def trim_to_waited(self, object_fetch: ObjectFetch, blocks: range) -> range:
        """The shortest prefix of the blocks that holds all that somebody waits for."""


def run_flight(
    plan: FlightPlan,
    block_source: BlockSource,
    listener: FlightListener,
    *,
    deadline: float,
    cancelled: Callable[[], bool],
) -> tuple[list[int], FusecacheError | None]:
    """Do a job; returns its blocks that did not land though nothing failed, or what failed."""
    object_fetch = plan.object_fetch
    try:
        if plan.is_verification:
            return verify_blocks(object_fetch, plan.blocks, listener), None
        left = fetch_blocks(
            object_fetch,
            plan.blocks,
            block_source,
            listener,
            deadline=deadline,
            cancelled=cancelled,
            urgent=plan.urgent,
        )
        return left, None
    except NotFoundError as error:
        gone = VersionChangedError(f"{object_fetch.version.key} was deleted at the origin: open it again")
        gone.__cause__ = error
        return [], gone
    except FusecacheError as error:
        return [], error
    except Exception as error:
        _log.exception("a flight failed")
        return [], UnavailableError(f"{object_fetch.version.key}: {type(error).__name__}: see the log")


def verify_blocks(object_fetch: ObjectFetch, blocks: range, listener: FlightListener) -> list[int]:
    """Hash blocks that an earlier run left in the data file; returns those that were bad or are gone."""
    bad = []
    for block in blocks:
        if object_fetch.stored.verify_block(block):
            listener.block_arrived(object_fetch, block, None)
        else:
            bad.append(block)
    return bad


def fetch_blocks(
    object_fetch: ObjectFetch,
    blocks: range,
    block_source: BlockSource,
    listener: FlightListener,
    *,
    deadline: float,
    cancelled: Callable[[], bool],
    urgent: bool = True,
) -> list[int]:
    """Fetch blocks; returns those that did not land though nothing failed.

    `deadline` is a time.monotonic(). Raises what BlockSource.send_blocks raises, and StoreError when the store failed:
    blocks that landed before that stay.
    """
    with object_fetch.stored.claim_blocks(blocks) as granted:
        if len(granted) < len(blocks):
            listener.blocks_claimed_elsewhere(object_fetch, range(granted.stop, blocks.stop))
            blocks = granted
        if not blocks:
            return []
        if any(
            object_fetch.stored.is_unverified(block) or object_fetch.stored.is_present(block)
            for block in blocks
        ):
            return list(blocks)  # another process brought them while we asked
        reserved = object_fetch.byte_count(blocks)
        if object_fetch.belongs_in_store(blocks.start) and object_fetch.stored.reserve_bytes(reserved):
            sink: _MemorySink = _StoreSink(object_fetch, listener, reserved)
            left: list[int] = []
        else:
            asked, blocks = blocks, listener.trim_to_waited(object_fetch, blocks)
            left = list(range(blocks.stop, asked.stop))
            sink = _MemorySink(object_fetch, listener)
        if blocks:
            try:
                items = block_source.send_blocks(
                    object_fetch.version,
                    object_fetch.source,
                    blocks,
                    object_fetch.stored.block_size,
                    deadline=deadline,
                    cancelled=cancelled,
                    urgent=urgent,
                )
                _receive_blocks(object_fetch, blocks, items, sink)
            finally:
                sink.close()
        return left


def _receive_blocks(
    object_fetch: ObjectFetch,
    blocks: range,
    items: Iterator[Buffer | ExpectedChecksum | BlockRestart],
    sink: _MemorySink,
) -> None:
    block_size, size = object_fetch.stored.block_size, object_fetch.version.size
    block = blocks.start
    offset = block * block_size
    room = block_length(block, size, block_size)
    expected: ExpectedChecksum | None = None
    for item in items:
        if isinstance(item, ExpectedChecksum | BlockRestart):
            expected = item if isinstance(item, ExpectedChecksum) else None
            if offset > block * block_size:
                sink.restart_block()
                offset = block * block_size
                room = block_length(block, size, block_size)
            continue
        with memoryview(item) as view:
            sink.write_bytes(offset, view)
            at = 0
            while at < len(view):
                part = view[at : at + room]
                sink.add_bytes(part)
                at += len(part)
                room -= len(part)
                offset += len(part)
                if room:
                    continue
                if expected is not None and not sink.matches_checksum(expected.checksum):
                    expected.is_mismatch = True
                    sink.restart_block()
                    offset = block * block_size
                    room = block_length(block, size, block_size)
                    break
                expected = None
                sink.end_block(block)
                block += 1
                if block < blocks.stop:
                    room = block_length(block, size, block_size)


class _MemorySink:
    """Keeps the blocks in memory for their waiters."""

    def __init__(self, object_fetch: ObjectFetch, listener: FlightListener) -> None:
        self._load = object_fetch
        self._listener = listener
        self._block_bytes = bytearray()

    def write_bytes(self, offset: int, data: memoryview) -> None:
        """Bytes for the data file."""

    def add_bytes(self, data: memoryview) -> None:
        """The next bytes of the current block."""
        self._block_bytes += data

    def end_block(self, block: int) -> None:
        """All bytes of the block were added."""
        piece, self._block_bytes = bytes(self._block_bytes), bytearray()
        self._listener.block_arrived(self._load, block, piece)

    def matches_checksum(self, checksum: int) -> bool:
        """Whether the bytes of the current block have this xxh3_64."""
        digest = xxhash.xxh3_64()
        digest.update(self._block_bytes)
        return (digest.intdigest() or 1) == checksum

    def restart_block(self) -> None:
        """Begin the current block anew."""
        self._block_bytes = bytearray()

    def close(self) -> None:
        """The flight is over."""


class _StoreSink(_MemorySink):
    """Writes the blocks into the store, whose space was reserved."""

    def __init__(self, object_fetch: ObjectFetch, listener: FlightListener, reserved_bytes: int) -> None:
        super().__init__(object_fetch, listener)
        self._reserved_bytes = reserved_bytes
        self._digest = xxhash.xxh3_64()

    def write_bytes(self, offset: int, data: memoryview) -> None:
        self._load.stored.write(offset, data)

    def add_bytes(self, data: memoryview) -> None:
        self._digest.update(data)

    def matches_checksum(self, checksum: int) -> bool:
        return (self._digest.intdigest() or 1) == checksum

    def restart_block(self) -> None:
        self._digest.reset()

    def end_block(self, block: int) -> None:
        stored = self._load.stored
        checksum = self._digest.intdigest()
        self._digest.reset()
        self._reserved_bytes -= block_length(block, self._load.version.size, stored.block_size)
        stored.commit_block(block, checksum)
        if not stored.is_present(block):
            raise StoreError(f"{self._load.version.key}: the cache gave the object up")
        self._listener.block_arrived(self._load, block, None)

    def close(self) -> None:
        if self._reserved_bytes > 0:
            self._load.stored.unreserve_bytes(self._reserved_bytes)
