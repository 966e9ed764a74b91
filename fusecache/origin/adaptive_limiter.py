"""How many requests may be in flight: halved when the origin throttles, grown slowly when it does not (AIMD).

A slot is taken per request, in the order of asking. A request that was sent before the last halving does not halve
again: its 503 is news about the old rate. Each success adds 1/limit, so one round of requests adds one slot.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from fusecache.errors import OriginError, UnavailableError
from fusecache.origin.backoff import raise_last_error
from fusecache.semaphore import ResizableSemaphore

_MIN_SLOTS = 4
"""Never fewer slots: with one, a single request that stalls, or one key that is throttled for good, would stop all."""


class AdaptiveLimiter:
    """Slots whose number adapts. The lock guards the limit and is a leaf: nothing is called while it is held.

    | What happens | The limit |
    |---|---|
    | in the beginning | is `most` |
    | a request that was sent after the last halving is throttled | is halved, but not below 4 (or `most`) |
    | a request that was sent before the last halving is throttled | stays |
    | a request succeeds | grows by 1/limit, up to `most` |
    """

    def __init__(self, most: int) -> None:
        self._max_limit = most
        self._min_limit = min(most, _MIN_SLOTS)
        self._limit = float(most)
        self._halvings = 0
        self._lock = threading.Lock()
        self._slots = ResizableSemaphore(lambda: self.limit)

    @property
    def limit(self) -> int:
        """Requests that may be in flight at this moment."""
        return int(self._limit)

    @contextlib.contextmanager
    def hold_slot(
        self,
        where: str,
        deadline: float,
        cancelled: Callable[[], bool],
        last_error: OriginError | None = None,
    ) -> Iterator[int]:
        """A with block that holds a slot; gives the generation, which `note_throttled` wants to know.

        Waits until `deadline`, an instant of time.monotonic(); then raises UnavailableError, or what
        `raise_last_error` makes of `last_error`, the failure after which this request is made. Raises
        CancelledReadError when `cancelled()` is true before.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._slots.hold_slot(time.monotonic, deadline, cancelled, where))
            except UnavailableError:
                if last_error is not None:
                    raise_last_error(last_error)
                raise
            yield self._halvings

    def note_throttled(self, generation: int) -> None:
        """Halve the limit, because a request of this generation was throttled; not if it was halved since."""
        with self._lock:
            if generation == self._halvings:
                self._halvings += 1
                self._limit = max(float(self._min_limit), self._limit / 2)

    def note_success(self) -> None:
        """Let the limit grow, because a request was answered in full."""
        with self._lock:
            if self._limit < self._max_limit:
                self._limit = min(float(self._max_limit), self._limit + 1 / self._limit)
