"""Exponential backoff with full jitter that honours Retry-After and ends at a deadline."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from fusecache.errors import CancelledReadError, OriginError, ThrottledError, UnavailableError
from fusecache.semaphore import wait_cancellable

_never_set = threading.Event()


class Backoff:
    """The pauses between the attempts at one request. Each thread has its own.

    | What happens | The next pause, before jitter |
    |---|---|
    | in the beginning, or after `reset_pauses` | is the first pause |
    | a pause was made | is twice as long, up to the longest |
    """

    def __init__(self, initial: float, longest: float) -> None:
        self._first_pause = initial
        self._longest_pause = longest
        self._attempts = 0

    def reset_pauses(self) -> None:
        """Begin with the first pause again, because bytes came."""
        self._attempts = 0

    def wait_before_retry(self, error: OriginError, deadline: float, cancelled: Callable[[], bool]) -> None:
        """Wait before the attempt that follows `error`; at least as long as the origin asked for.

        Raises what `raise_last_error` raises, at once, if the pause would reach the deadline (an instant of
        time.monotonic()); CancelledReadError when `cancelled()` is true.
        """
        bound = min(self._longest_pause, self._first_pause * 2 ** min(self._attempts, 30))
        self._attempts += 1
        # Not from zero: a storm of clients would be back at once.
        delay = random.uniform(bound / 2, bound)  # noqa: S311
        if isinstance(error, ThrottledError) and error.retry_after is not None:
            delay = max(delay, error.retry_after)
        until = time.monotonic() + delay
        if until >= deadline:
            raise_last_error(error)
        wait_cancellable(_never_set, time.monotonic, until, cancelled)
        if cancelled():
            raise CancelledReadError("the reader went away")


def raise_last_error(error: OriginError) -> NoReturn:
    """Raise the error of a request whose deadline has come, and whose last attempt failed with `error`:
    UnavailableError from `error`, or `error` itself if no later attempt would mend it (access denied)."""
    if not error.is_temporary:
        raise error
    raise UnavailableError(f"{error}; tried until the deadline") from error
