"""How a caller of the client watches a request, and takes its blocks. No sockets."""

from __future__ import annotations

import time
from typing import Protocol


class TransferObserver(Protocol):
    """Watches a request while its answer is waited for. All of it is called in the thread that waits, and may ask
    another node, but raises nothing that is not fatal."""

    def bytes_arrived(self) -> None:
        """Bytes of blocks came."""
        ...

    def node_waiting(self, age: float) -> None:
        """The node says that it waits itself; the node or origin at the end of what it waits for was heard of `age`
        seconds ago."""
        ...

    def poll(self) -> str | None:
        """Called about every half second, and as bytes come: why not to wait any longer, in words; None: there is
        reason to wait."""
        ...


class BlockReceiver(Protocol):
    """Takes the blocks of one answer, in order. All of it is called in the thread that receives."""

    def begin_block(self, checksum: int) -> None:
        """The next block begins; its sender says that its bytes have this xxh3_64, 1 in place of 0."""
        ...

    def write(self, view: memoryview) -> None:
        """The next bytes of the block, which are valid during the call only."""
        ...

    def end_block(self) -> bool:
        """All bytes of the block were written; returns whether they have the checksum."""
        ...


class RequestTimeout:
    """An observer that finds an answer not worth waiting for once a time is over."""

    def __init__(self, timeout: float) -> None:
        """`timeout` is in seconds from now."""
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    def bytes_arrived(self) -> None:
        """Changes nothing: the whole answer has to come in time."""

    def node_waiting(self, age: float) -> None:
        """Changes nothing: that the node waits itself gains it no time."""

    def poll(self) -> str | None:
        """Why not to wait any longer, once the time is over."""
        return f"no answer within {self._timeout:g} s" if time.monotonic() > self._deadline else None
