"""A lock that knows which thread holds it, so that a method which needs it held can say so.

A method whose name ends in `_locked` is called by a thread that holds the lock which the docstring of its class names,
and begins with `assert_held()`. The assertion is active in processes whose environment has FUSECACHE_DEBUG_LOCKS=1, as
the tests have it; otherwise it costs one attribute look-up.
"""

from __future__ import annotations

import os
import threading
from typing import cast

DEBUG_VARIABLE = "FUSECACHE_DEBUG_LOCKS"


class OwnedLock:
    """A mutex like threading.Lock: not reentrant, and usable in a `with` block. It is released by the thread that took
    it.

    | State | Event | Next state |
    |---|---|---|
    | free | a thread enters, or calls `acquire` | held by that thread |
    | held | its thread leaves, calls `release`, or waits on a condition of this lock | free |
    | held | its own thread enters once more | held: AssertionError with checks, otherwise a deadlock |
    """

    __slots__ = ("_is_checked", "_lock", "_owner")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        """Identifier of the thread that holds the lock; 0: no thread does. Written by the holder only."""
        self._is_checked = os.environ.get(DEBUG_VARIABLE) == "1"

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock; returns False if another thread still held it after `timeout` seconds (-1: wait without
        end), or at once without `blocking`. With checks: AssertionError if this thread holds it already."""
        if self._is_checked and blocking and self._is_owned():
            raise AssertionError("this thread would wait for a lock that it holds itself")
        is_taken = self._lock.acquire(blocking, timeout)
        if is_taken:
            self._owner = threading.get_ident()
        return is_taken

    def release(self) -> None:
        """Free the lock; this thread holds it. With checks: AssertionError if it does not."""
        self.assert_held()
        self._owner = 0
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()

    def assert_held(self) -> None:
        """With checks: AssertionError unless this thread holds the lock. Without them it does nothing."""
        if self._is_checked and not self._is_owned():
            raise AssertionError("the caller does not hold the lock that this needs")

    def locked(self) -> bool:
        """Whether some thread holds the lock."""
        return self._lock.locked()

    def new_condition(self) -> threading.Condition:
        """A condition over this lock: its `wait` frees the lock, and takes it again before it returns."""
        # Condition is typed for the locks of `threading`, and asks a lock for no more than this class has.
        return threading.Condition(cast(threading.Lock, self))

    def _is_owned(self) -> bool:
        """Whether this thread holds the lock. Also what threading.Condition asks."""
        return self._owner == threading.get_ident()
