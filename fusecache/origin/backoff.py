"""Exponential backoff with full jitter that honours Retry-After and ends at a deadline."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from fusecache.errors import CancelledReadError, OriginError, ThrottledError, UnavailableError

_POLL_SECONDS = 0.1
_never_set = threading.Event()


class Backoff:
    """The pauses between the attempts at one thing. Not shared between threads."""

    def __init__(self, initial: float, longest: float) -> None:
        self._first_pause = initial
        self._longest_pause = longest
        self._attempts = 0

    def reset_pauses(self) -> None:
        """Bytes came: begin with short pauses again."""
        self._attempts = 0

    def wait_before_retry(self, error: OriginError, deadline: float, cancelled: Callable[[], bool]) -> None:
        """Wait before the next attempt.

        Raises what `give_up` does, if that would be after the deadline, and CancelledReadError.
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
        while (left := until - time.monotonic()) > 0:
            if cancelled():
                raise CancelledReadError("the reader went away")
            _never_set.wait(min(left, _POLL_SECONDS))


def raise_last_error(error: OriginError) -> NoReturn:
    """The deadline has come, and `error` was the last failure: the reason, or the answer where it is one.

    Raises UnavailableError from `error`; `error` itself if no later attempt would mend it (access denied).
    """
    if not error.is_temporary:
        raise error
    raise UnavailableError(f"{error}; tried until the deadline") from error
