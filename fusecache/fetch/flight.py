"""One flight: bring a run of blocks into the store, and wake each block's waiters as it arrives.

Runs in a worker thread; all bulk work (receiving, hashing, writing) lets the GIL go. Memory: one chunk of the block
source's, and one block when the store can't take it. Without space, or with a broken disk, the blocks that a reader
waits for are handed over from memory, and the reader notices nothing.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import xxhash

from fusecache.blocks import block_length
from fusecache.checksum import block_checksum
from fusecache.errors import (
    FusecacheError,
    NotFoundError,
    StoreError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.fetch.block_source import BlockSource
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch

_log = logging.getLogger(__name__)


class FlightListener(Protocol):
    """The runner of flights, as one flight sees it, which reports to it. All methods take the scheduling lock."""

    def block_arrived(self, object_fetch: ObjectFetch, block: int, piece: bytes | None) -> None:
        """The block is in the store (`piece` is None), or its bytes are `piece` and are nowhere else."""

    def blocks_claimed_elsewhere(self, object_fetch: ObjectFetch, blocks: range) -> None:
        """Another process fetches these blocks: the service looks for them in the store soon."""

    def trim_to_waited(self, object_fetch: ObjectFetch, blocks: range) -> range:
        """The shortest prefix of the blocks that holds every block that a reader waits for."""


def run_flight(
    plan: FlightPlan,
    block_source: BlockSource,
    listener: FlightListener,
    *,
    deadline: float,
    cancelled: Callable[[], bool],
) -> tuple[list[int], FusecacheError | None]:
    """Do what the plan says; returns its blocks that did not arrive though nothing failed, and what failed.

    Blocks, until `deadline`, a time.monotonic(), at most. Raises nothing.
    """
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
    """Hash blocks that an earlier run left in the data file; returns those whose bytes were bad or are gone. Blocks on
    the disk."""
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
    """Fetch blocks; returns those that did not arrive though nothing failed. Blocks.

    `deadline` is a time.monotonic(). Raises what BlockSource.send_blocks raises, and StoreError when the store failed:
    blocks that arrived before that stay.
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
        left: list[int] = []
        sink: _FlightSink
        if object_fetch.belongs_in_store(blocks.start) and object_fetch.stored.reserve_bytes(reserved):
            sink = _StoreSink(object_fetch, blocks.start, listener, reserved)
        else:
            asked, blocks = blocks, listener.trim_to_waited(object_fetch, blocks)
            left = list(range(blocks.stop, asked.stop))
            sink = _MemorySink(object_fetch, blocks.start, listener)
        if blocks:
            try:
                block_source.send_blocks(
                    object_fetch.version,
                    object_fetch.source,
                    blocks,
                    object_fetch.stored.block_size,
                    sink,
                    deadline=deadline,
                    cancelled=cancelled,
                    urgent=urgent,
                )
            finally:
                sink.close()
        return left


class _FlightSink(ABC):
    """The block sink of one flight: counts and hashes the bytes of the open block, and reports each block that arrived.

    State: `_block` is the block that is open or due, and grows when a block ends well; `_filled_bytes` of it were
    written, and go back to 0 when it begins, ends or restarts. The subclass keeps the bytes.
    """

    def __init__(self, object_fetch: ObjectFetch, first_block: int, listener: FlightListener) -> None:
        self._object_fetch = object_fetch
        self._listener = listener
        self._block = first_block
        self._filled_bytes = 0
        self._expected_checksum: int | None = None
        self._digest = xxhash.xxh3_64()

    def begin_block(self, checksum: int | None) -> None:
        """Open the block that is due, without bytes."""
        self.restart_block()
        self._expected_checksum = checksum

    def write(self, view: memoryview) -> None:
        """Keep the bytes, and hash them."""
        self._keep_bytes(self._filled_bytes, view)
        self._digest.update(view)
        self._filled_bytes += len(view)

    def end_block(self) -> bool:
        """Report the block as arrived if its bytes have the checksum; otherwise forget them. Raises ValueError when the
        source wrote more or less than the block has: that is a mistake in the program."""
        block, stored = self._block, self._object_fetch.stored
        length = block_length(block, self._object_fetch.version.size, stored.block_size)
        if self._filled_bytes != length:
            raise ValueError(f"{self._filled_bytes} bytes were written for block {block}, which has {length}")
        checksum = block_checksum(self._digest)
        if self._expected_checksum is not None and checksum != self._expected_checksum:
            self.restart_block()
            return False
        piece = self._finish_block(block, length, checksum)
        self.restart_block()
        self._block += 1
        self._listener.block_arrived(self._object_fetch, block, piece)
        return True

    def restart_block(self) -> None:
        """Forget the bytes of the open block."""
        self._digest.reset()
        self._filled_bytes = 0

    @abstractmethod
    def close(self) -> None:
        """The flight is over: give back what was reserved and not used."""

    @abstractmethod
    def _keep_bytes(self, offset: int, view: memoryview) -> None:
        """Keep bytes that begin at this offset of the open block."""

    @abstractmethod
    def _finish_block(self, block: int, length: int, checksum: int) -> bytes | None:
        """All bytes of the block were kept; returns them unless the store has them now."""


class _MemorySink(_FlightSink):
    """Keeps the open block in memory, and hands it over to the readers that wait for it."""

    def __init__(self, object_fetch: ObjectFetch, first_block: int, listener: FlightListener) -> None:
        super().__init__(object_fetch, first_block, listener)
        self._block_bytes = bytearray()

    def close(self) -> None:
        """Nothing was reserved."""

    def restart_block(self) -> None:
        """Forget the bytes of the open block, which are in memory only."""
        super().restart_block()
        self._block_bytes = bytearray()

    def _keep_bytes(self, offset: int, view: memoryview) -> None:
        self._block_bytes += view

    def _finish_block(self, block: int, length: int, checksum: int) -> bytes | None:
        return bytes(self._block_bytes)


class _StoreSink(_FlightSink):
    """Writes the blocks into the store, where `reserved_bytes` are reserved for them."""

    def __init__(
        self, object_fetch: ObjectFetch, first_block: int, listener: FlightListener, reserved_bytes: int
    ) -> None:
        super().__init__(object_fetch, first_block, listener)
        self._reserved_bytes = reserved_bytes

    def close(self) -> None:
        """Give back the space that was reserved for blocks that did not arrive."""
        if self._reserved_bytes > 0:
            self._object_fetch.stored.unreserve_bytes(self._reserved_bytes)

    def _keep_bytes(self, offset: int, view: memoryview) -> None:
        stored = self._object_fetch.stored
        stored.write(self._block * stored.block_size + offset, view)

    def _finish_block(self, block: int, length: int, checksum: int) -> bytes | None:
        stored = self._object_fetch.stored
        self._reserved_bytes -= length
        stored.commit_block(block, checksum)
        if not stored.is_present(block):
            raise StoreError(f"{self._object_fetch.version.key}: the cache gave the object up")
        return None
