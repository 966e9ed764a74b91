"""A read that waits for blocks. Plain data: the loader's lock guards all of it until it is settled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fusecache.errors import FusecacheError

if TYPE_CHECKING:
    from fusecache.fetch.object_fetch import ObjectFetch

_log = logging.getLogger(__name__)


class Waiter:
    """The bytes [offset, offset + length) of one object, wanted until `deadline` (a time.monotonic()).

    `settled` is called exactly once, from any thread and without a lock: when the bytes are there (`error` is
    None), or when they can't be had. It is not called after a successful cancel. `pieces` holds the blocks
    that could not be stored; all others are in the store. `urgent`: a reader waits, and not somebody's prefetch.
    `sealed`: it waits for all of the object, and that somebody vouches for it (see gate.py).
    """

    __slots__ = (
        "awaits_attestation",
        "deadline",
        "error",
        "length",
        "missing_blocks",
        "object_fetch",
        "offset",
        "on_settled",
        "pieces",
        "urgent",
        "waiting_since",
    )

    def __init__(
        self,
        object_fetch: ObjectFetch,
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
        self.object_fetch = object_fetch
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


def settle_waiters(waiters: Iterable[Waiter], error: FusecacheError | None) -> None:
    """Tell these readers that their bytes are there, or why not. Without a lock: they answer the kernel."""
    for waiter in waiters:
        waiter.error = error
        try:
            waiter.on_settled(waiter)
        except Exception:
            _log.exception("%s: a reader could not be answered", waiter.object_fetch.version.key)
