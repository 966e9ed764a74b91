"""Work that may block, off the event loop and outside of all requests, done one after the other by one thread."""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

Job = Callable[[], None]


class BackgroundJobs:
    """The `background-jobs` thread and its queue.

    | From | By | To |
    |---|---|---|
    | not started: jobs queue up | `start` | running: jobs are done in the order in which they came |
    | running | `close` | ended: what came before `close` is done, what comes later never is |

    Thread-safe; adding a job neither blocks nor takes a lock that is held across a job. A job that raises is logged.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, Job] | None] = queue.SimpleQueue()
        """(when, a time.monotonic() or 0.0 for at once; what). None ends the thread."""
        self._thread = threading.Thread(target=self._run_jobs, name="background-jobs", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Do what was asked for until now, but not what is for later, and end. Blocks for at most `timeout` seconds."""
        self._queue.put(None)
        self._thread.join(timeout)

    def run_in_background(self, job: Job) -> None:
        """Have a job done as soon as those before it are. Does not block."""
        self._queue.put((0.0, job))

    def run_later(self, delay: float, job: Job) -> None:
        """Have a job done in `delay` seconds, or a little later. Does not block."""
        self._queue.put((time.monotonic() + delay, job))

    def _run_jobs(self) -> None:
        later: list[tuple[float, int, Job]] = []
        numbers = itertools.count()
        while True:
            wait = later[0][0] - time.monotonic() if later else None
            if wait is not None and wait <= 0:
                self._run_job(heapq.heappop(later)[2])
                continue
            try:
                item = self._queue.get(timeout=wait)
            except queue.Empty:
                continue
            if item is None:
                return
            when, job = item
            if when:
                heapq.heappush(later, (when, next(numbers), job))
            else:
                self._run_job(job)

    def _run_job(self, job: Job) -> None:
        try:
            job()
        except Exception:
            _log.exception("a background job failed in an unforeseen way")
