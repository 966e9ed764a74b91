"""The simulated network: a clock, links with a rate each way, and streams of blocks that share them.

Every node has a NIC that sends and receives at the same time; the origin has one that only sends. Between them nothing
is limited: a switch that does not block. A stream sends a run of blocks at a time, and streams that leave by one link
take turns, so that each gets the same share of it, and what one of them can't use (its receiver's link is busy, or
its next block has not come yet) the others get: max-min fairness, at the grain of a run. No stream has more than
WINDOW runs on their way, as a TCP window has it. A request, and the first byte of a run, takes `latency`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

WINDOW = 2
"""Runs of one stream on their way at a time."""


class Clock:
    """Simulated time, in seconds, and what happens when. What is due at the same time happens in the order in which it
    was asked for, so that a run can be repeated."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self.stopped = False
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call this at that time, which is not over."""
        self._count += 1
        heapq.heappush(self._due, (when, self._count, call, arguments))

    def run(self, limit: float) -> bool:
        """Until `stopped`; False: nothing is left to happen, or `limit` is over."""
        while not self.stopped and self._due and self._due[0][0] <= limit:
            self.run_one()
        return self.stopped

    def run_one(self) -> bool:
        """Have the next thing happen; False: there is none."""
        if not self._due:
            return False
        self.now, _, call, arguments = heapq.heappop(self._due)
        self.events += 1
        call(*arguments)
        return True


class Stream:
    """Blocks on their way from one node to another, in order. `ready` is how many of them the sender has, and grows;
    `landed` is called with the number of further blocks that came."""

    __slots__ = ("arrived", "count", "ended", "landed", "next", "ready", "sent", "sink", "source")

    def __init__(self, source: int, sink: int, count: int, landed: Callable[[Stream, int], None]) -> None:
        self.source = source
        self.sink = sink
        self.count = count
        self.landed = landed
        self.ready = 0
        self.sent = 0
        self.arrived = 0
        self.next = 0
        """Blocks that wait for their turn, or are being sent."""
        self.ended = False
        """No more is sent, and nothing lands any more."""


class Network:
    """Links of `up` and `down` bytes per second; `run` is in blocks of `block` bytes."""

    def __init__(
        self, clock: Clock, up: Sequence[float], down: Sequence[float], latency: float, block: int, run: int
    ) -> None:
        count = len(up)
        self.latency = latency
        self.bytes_up = [0] * count
        """Sent by each so far."""
        self.bytes_down = [0] * count
        self.owed = [0] * count
        """Bytes that are there and wait for room on their way out."""
        self.queued = 0
        """Most streams that ever waited for one link."""
        self._clock = clock
        self._block = block
        self._run = run
        self._up = [block / rate for rate in up]
        self._down = [block / rate for rate in down]
        self._free = [0.0] * count
        """When each downlink has taken what is on its way to it."""
        self._busy = [False] * count
        self._queues: list[deque[Stream]] = [deque() for _ in range(count)]

    def offer(self, stream: Stream) -> None:
        """It may have something to send."""
        left = stream.ready - stream.sent
        if stream.next or left <= 0 or stream.ended:
            return
        if stream.sent - stream.arrived > (WINDOW - 1) * self._run:
            return
        source = stream.source
        stream.next = blocks = min(left, self._run)
        self.owed[source] += blocks * self._block
        if self._busy[source]:
            queue = self._queues[source]
            queue.append(stream)
            if len(queue) > self.queued:
                self.queued = len(queue)
        else:
            self._send(stream)

    def _send(self, stream: Stream) -> None:
        clock, source, sink, blocks = self._clock, stream.source, stream.sink, stream.next
        self._busy[source] = True
        over = clock.now + blocks * self._up[source]
        clock.at(over, self._sent, stream, blocks)
        soonest = clock.now + self.latency
        began = max(self._free[sink], soonest)
        there = max(began + blocks * self._down[sink], over + self.latency)
        self._free[sink] = there
        clock.at(there, self._arrived, stream, blocks)

    def _sent(self, stream: Stream, blocks: int) -> None:
        source, nbytes = stream.source, blocks * self._block
        self.bytes_up[source] += nbytes
        self.owed[source] -= nbytes
        stream.sent += blocks
        stream.next = 0
        self.offer(stream)  # the link counts as busy: it goes to the end of the queue
        queue = self._queues[source]
        while queue:
            following = queue.popleft()
            if not following.ended:
                self._send(following)
                return
            self.owed[source] -= following.next * self._block
            following.next = 0
        self._busy[source] = False

    def _arrived(self, stream: Stream, blocks: int) -> None:
        self.bytes_down[stream.sink] += blocks * self._block
        if stream.ended:
            return
        stream.arrived += blocks
        stream.landed(stream, blocks)
        self.offer(stream)
