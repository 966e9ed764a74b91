"""A read that waits for blocks. Plain data: the loader's lock guards all of it until it is settled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fusecache.errors import FusecacheError

if TYPE_CHECKING:
    from fusecache.loader.load import ObjectLoad

_log = logging.getLogger(__name__)


class Waiter:
    """The bytes [offset, offset + length) of one object, wanted until `deadline` (a time.monotonic()).

    `settled` is called exactly once, from any thread and without a lock: when the bytes are there (`error` is
    None), or when they can't be had. It is not called after a successful cancel. `pieces` holds the blocks
    that could not be stored; all others are in the store. `urgent`: a reader waits, and not somebody's prefetch.
    `sealed`: it waits for all of the object, and that somebody vouches for it (see gate.py).
    """

    __slots__ = (
        "deadline",
        "error",
        "length",
        "load",
        "missing",
        "offset",
        "pieces",
        "sealed",
        "settled",
        "since",
        "urgent",
    )

    def __init__(
        self,
        load: ObjectLoad,
        offset: int,
        length: int,
        *,
        missing: Sequence[int],
        since: float,
        deadline: float,
        settled: Callable[[Waiter], None],
        urgent: bool = True,
        sealed: bool = False,
    ) -> None:
        self.load = load
        self.offset = offset
        self.length = length
        self.missing = set() if sealed else set(missing)
        self.since = since
        self.deadline = deadline
        self.settled = settled
        self.urgent = urgent
        self.sealed = sealed
        self.error: FusecacheError | None = None
        self.pieces: dict[int, bytes] = {}


def settle(waiters: Iterable[Waiter], error: FusecacheError | None) -> None:
    """Tell these readers that their bytes are there, or why not. Without a lock: they answer the kernel."""
    for waiter in waiters:
        waiter.error = error
        try:
            waiter.settled(waiter)
        except Exception:
            _log.exception("%s: a reader could not be answered", waiter.load.version.key)
