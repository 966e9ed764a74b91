"""How far one flight has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecache.fetch.block_source import BlockSink
from fusecache.types import ObjectVersion


@dataclass
class PeerTransfer:
    """The blocks of one flight, whichever node they come from, on their way into the flight's sink. Used by the
    flight's thread only.

    | What happens | `next_block` | `has_open_block` |
    |---|---|---|
    | `begin_block` | unchanged | True |
    | `end_block` is True | the one behind | False |
    | `end_block` is False, `restart_open_block` | unchanged: its bytes are void | False |
    """

    version: ObjectVersion
    blocks: range
    block_size: int
    deadline: float
    """As time.monotonic()."""
    cancelled: Callable[[], bool]
    sink: BlockSink
    is_urgent: bool
    """A reader waits for the blocks; otherwise they are fetched ahead."""
    next_block: int
    """The first block that has not arrived."""
    has_open_block: bool = False

    @property
    def remaining(self) -> range:
        """The blocks that have not arrived."""
        return range(self.next_block, self.blocks.stop)

    def begin_block(self, checksum: int) -> None:
        """The next block begins; its sender says that it has this checksum."""
        self.has_open_block = True
        self.sink.begin_block(checksum)

    def end_block(self) -> bool:
        """All bytes of the open block were written to the sink; returns whether they had the checksum."""
        self.has_open_block = False
        is_good = self.sink.end_block()
        if is_good:
            self.next_block += 1
        return is_good

    def restart_open_block(self) -> None:
        """Void the open block, if there is one: the next sender begins with it again."""
        if self.has_open_block:
            self.has_open_block = False
            self.sink.restart_block()
