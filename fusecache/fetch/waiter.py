"""A read that waits for blocks. Plain data: the scheduling lock guards all of it until it is settled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from fusecache.errors import FusecacheError

_log = logging.getLogger(__name__)


class Waiter:
    """The bytes [offset, offset + length) of the object `key`, wanted until `deadline` (a time.monotonic()).

    `on_settled` is called exactly once, from any thread and without a lock: when the bytes are there (`error` is None),
    or when they can't be had. It is not called after a successful cancel. `pieces` holds the blocks that could not be
    stored; all others are in the store. `urgent`: a reader waits, and not a prefetch of another node.
    `awaits_attestation`: it waits until the whole object is there and attested, and for no single block.

    | State | Event | Next state |
    |---|---|---|
    | waiting | the last of `missing_blocks` arrives, or the object is attested | settled without an error |
    | waiting | a flight fails for good, the deadline passes, or the mount goes away | settled with an error |
    | waiting | its reader cancels it | forgotten |
    """

    __slots__ = (
        "awaits_attestation",
        "deadline",
        "error",
        "key",
        "length",
        "missing_blocks",
        "offset",
        "on_settled",
        "pieces",
        "urgent",
        "waiting_since",
    )

    def __init__(
        self,
        key: str,
        offset: int,
        length: int,
        *,
        missing_blocks: Sequence[int],
        waiting_since: float,
        deadline: float,
        on_settled: Callable[[Waiter], None],
        urgent: bool = True,
        awaits_attestation: bool = False,
    ) -> None:
        self.key = key
        self.offset = offset
        self.length = length
        self.missing_blocks = set() if awaits_attestation else set(missing_blocks)
        self.waiting_since = waiting_since
        self.deadline = deadline
        self.on_settled = on_settled
        self.urgent = urgent
        self.awaits_attestation = awaits_attestation
        self.error: FusecacheError | None = None
        self.pieces: dict[int, bytes] = {}

    def block_arrived(self, block: int, piece: bytes | None) -> None:
        """This block is in the store, or only in `piece`."""
        self.missing_blocks.discard(block)
        if piece is not None:
            self.pieces[block] = piece


def settle_waiters(waiters: Iterable[Waiter], error: FusecacheError | None) -> None:
    """Tell these readers that their bytes are there, or why not. The caller holds no lock: the readers answer the
    kernel. A reader that raises is logged, and the others are still told."""
    for waiter in waiters:
        waiter.error = error
        try:
            waiter.on_settled(waiter)
        except Exception:
            _log.exception("%s: a reader could not be answered", waiter.key)
