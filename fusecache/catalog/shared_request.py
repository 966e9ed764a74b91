"""Requests to the origin that several tasks of the event loop wait for."""

from __future__ import annotations

import math

import trio

from fusecache.errors import FusecacheError

REQUEST_WAIT = 2.0
"""Seconds that a LOOKUP waits for the origin, after which it is answered from the tree that there is."""


class SharedRequest:
    """A request to the origin that is under way. Belongs to the event loop.

    The task that makes the request sets `error` if it fails, and then the event `done`.
    """

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: FusecacheError | None = None
        self._began_at = trio.current_time()

    async def wait_until_done(self, timeout: float = math.inf) -> bool:
        """Wait until the answer is there, but no longer than `timeout` seconds after the request began; returns whether
        it is there."""
        with trio.move_on_at(self._began_at + timeout):
            await self.done.wait()
        return self.done.is_set()
