"""The seam between a flight and the place its bytes come from.

A flight passes a `BlockSink` to a `BlockSource`, which writes the blocks into it, in order. A source that knows the
checksum of a block says so before it writes the block's bytes, and the sink tells it whether they had it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fusecache.blocks import block_length
from fusecache.origin.interface import Origin
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True)
class Route:
    """Where the stripes of one object come from. Flights do not cross the ends of a stripe."""

    stripe_blocks: int
    """Blocks of a stripe; the last stripe may be shorter."""
    remote_stripes: bytes
    """A byte per stripe; 1: the stripe comes from another node."""
    prefetch_order: Sequence[int]
    """The stripes, in the order in which they are fetched ahead."""
    stores_remote: bool = True
    """Whether blocks from other nodes are stored; otherwise they are only handed to the readers that wait for them."""
    stripe_owners: Sequence[str] = ()
    """The name of each stripe's owner; empty: nothing is limited per owner."""
    prefetch_window: int = 1 << 30
    """Stripes of one owner that are fetched ahead at a time."""
    is_origin_ordered: bool = False
    """Whether stripes from the origin are fetched ahead only after the stripes from other nodes in front of them."""
    owner_count: int = 0
    """How many other nodes own stripes of this object."""

    def owner_of_stripe(self, stripe: int) -> str | None:
        """The owner in whose window this stripe takes room; None: it takes room in no window."""
        return self.stripe_owners[stripe] if self.stripe_owners else None


class BlockSink(Protocol):
    """Takes the blocks of one flight, in order. Used by the flight's thread only.

    | between two blocks | `begin_block` | a block is open, and has no bytes yet |
    | a block is open | `write` | the bytes are appended to it |
    | a block is open | `end_block` is True | the block has arrived; the next one is due |
    | a block is open | `end_block` is False | the bytes did not have their checksum; the same block is due again |
    | a block is open | `restart_block` | its bytes so far are void; the same block is due again |
    | between two blocks | `restart_block` | nothing changes |
    """

    def begin_block(self, checksum: int | None) -> None:
        """Open the block that is due. `checksum` is the xxh3_64 that its bytes have to have, 1 in place of 0; None: the
        source does not know it."""
        ...

    def write(self, view: memoryview) -> None:
        """Append bytes to the open block; they are copied before this returns. May wait for the disk. Raises
        StoreError."""
        ...

    def end_block(self) -> bool:
        """Close the open block, all of whose bytes were written; returns whether they had their checksum. Wakes the
        block's waiters if so. Raises StoreError."""
        ...

    def restart_block(self) -> None:
        """Forget the bytes of the open block."""
        ...


class BlockSource(Protocol):
    """Where the bytes of flights come from. Thread-safe."""

    peer_workers: int
    """Threads that may wait for other nodes; 0: there are none."""

    def max_prefetch_flights(self) -> int:
        """How many of these threads may wait, at a time, for blocks that no reader waits for yet. Does not block."""
        ...

    def route_of(self, version: ObjectVersion, block_size: int) -> Route | None:
        """Where the stripes of this object come from; None: all come from its origin. May take milliseconds."""
        ...

    def send_blocks(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        sink: BlockSink,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> None:
        """Write these blocks of an object of the source of that name into the sink, in order. Blocks. `deadline` is a
        time.monotonic(); `cancelled` is asked while bytes are waited for; `urgent` says that a reader waits for them.
        Raises what Origin.read_range and the sink raise."""
        ...


class OriginBlockSource:
    """Sends every block from the origin of its source. Holds no state of its own."""

    peer_workers = 0

    def __init__(self, origins: Mapping[str, Origin]) -> None:
        """`origins` are the origins by the names of their sources."""
        self._origins = origins

    def max_prefetch_flights(self) -> int:
        """None: there are no other nodes."""
        return 0

    def route_of(self, version: ObjectVersion, block_size: int) -> Route | None:
        """None: all of it comes from its origin."""
        return None

    def send_blocks(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        sink: BlockSink,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> None:
        """Read the blocks from the origin with one request, and write them into the sink."""
        offset = blocks.start * block_size
        length = min(blocks.stop * block_size, version.size) - offset
        chunks = self._origins[source].read_range(
            version, offset, length, deadline=deadline, cancelled=cancelled
        )
        write_chunks(chunks, blocks, block_size, version.size, sink)


def write_chunks(
    chunks: Iterable[Buffer], blocks: range, block_size: int, object_size: int, sink: BlockSink
) -> None:
    """Write the bytes of `blocks` of an object of `object_size` bytes, which come in chunks that may cross the ends of
    blocks, into a sink. Raises what the chunks' iterator and the sink raise."""
    waiting = iter(blocks)
    missing = 0
    for chunk in chunks:
        with memoryview(chunk) as view:
            start = 0
            while start < len(view):
                if not missing:
                    missing = block_length(next(waiting), object_size, block_size)
                    sink.begin_block(None)
                with view[start : start + missing] as part:
                    sink.write(part)
                    start += len(part)
                    missing -= len(part)
                if not missing:
                    sink.end_block()
