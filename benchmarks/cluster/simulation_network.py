"""The simulated network: a clock, links with a rate each way, and streams of blocks that share them.

Every node has a NIC that sends and receives at the same time; the origin has one that only sends. Between them
nothing is limited: a switch that does not block. A stream sends a run of blocks at a time, and streams that leave by
one link take turns, so that each gets the same share of it, and the share that one of them can't use (its receiver's
link is busy, or its next block has not come yet) goes to the others: max-min fairness, at the grain of a run. No
stream has more than STREAM_WINDOW_RUNS runs on their way, as a TCP window has it. A request, and the first byte of a
run, takes `latency`."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

STREAM_WINDOW_RUNS = 2
"""Runs of one stream on their way at a time."""


class SimulatedClock:
    """Simulated time, in seconds, and the calls that are due. Calls that are due at the same time are made in the
    order in which they were scheduled, so that a run can be repeated."""

    def __init__(self) -> None:
        self.now = 0.0
        self.event_count = 0
        self.is_stopped = False
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled_count = 0

    def call_at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Schedule a call for that time, which is not over."""
        self._scheduled_count += 1
        heapq.heappush(self._due, (when, self._scheduled_count, call, arguments))

    def run_until_stopped(self, limit: float) -> bool:
        """Make the calls that are due until `is_stopped`; False: none is left, or the time `limit` is over."""
        while not self.is_stopped and self._due and self._due[0][0] <= limit:
            self.run_next_event()
        return self.is_stopped

    def run_next_event(self) -> bool:
        """Make the next call; False: there is none."""
        if not self._due:
            return False
        self.now, _, call, arguments = heapq.heappop(self._due)
        self.event_count += 1
        call(*arguments)
        return True


class SimulatedStream:
    """Blocks on their way from one node to another, in order. `ready_blocks` is how many of them the sender has, and
    grows; `on_arrival` is called with the number of further blocks that came."""

    __slots__ = (
        "arrived_blocks",
        "block_count",
        "is_ended",
        "on_arrival",
        "queued_blocks",
        "ready_blocks",
        "sent_blocks",
        "sink",
        "source",
    )

    def __init__(
        self, source: int, sink: int, block_count: int, on_arrival: Callable[[SimulatedStream, int], None]
    ) -> None:
        self.source = source
        self.sink = sink
        self.block_count = block_count
        self.on_arrival = on_arrival
        self.ready_blocks = 0
        self.sent_blocks = 0
        self.arrived_blocks = 0
        self.queued_blocks = 0
        """Blocks that wait for their turn, or are being sent."""
        self.is_ended = False
        """Nothing is sent or arrives any more."""


class SimulatedNetwork:
    """Links of `up` and `down` bytes per second, over which streams send runs of `run_blocks` blocks."""

    def __init__(
        self,
        clock: SimulatedClock,
        up: Sequence[float],
        down: Sequence[float],
        latency: float,
        block_bytes: int,
        run_blocks: int,
    ) -> None:
        count = len(up)
        self.latency = latency
        self.bytes_up = [0] * count
        """Bytes that each node has sent so far."""
        self.bytes_down = [0] * count
        self.unsent_bytes = [0] * count
        """Bytes that wait at each node for room on their way out."""
        self.longest_queue = 0
        """Most streams that ever waited for one link."""
        self._clock = clock
        self._block_bytes = block_bytes
        self._run_blocks = run_blocks
        self._uplink_block_seconds = [block_bytes / rate for rate in up]
        self._downlink_block_seconds = [block_bytes / rate for rate in down]
        self._downlink_free_at = [0.0] * count
        """When each downlink has taken the bytes that are on their way to it."""
        self._is_uplink_busy = [False] * count
        self._uplink_queues: list[deque[SimulatedStream]] = [deque() for _ in range(count)]

    def queue_run(self, stream: SimulatedStream) -> None:
        """The stream may have something to send: its next run waits for its turn, or is sent at once."""
        left = stream.ready_blocks - stream.sent_blocks
        if stream.queued_blocks or left <= 0 or stream.is_ended:
            return
        if stream.sent_blocks - stream.arrived_blocks > (STREAM_WINDOW_RUNS - 1) * self._run_blocks:
            return
        source = stream.source
        stream.queued_blocks = blocks = min(left, self._run_blocks)
        self.unsent_bytes[source] += blocks * self._block_bytes
        if self._is_uplink_busy[source]:
            queue = self._uplink_queues[source]
            queue.append(stream)
            if len(queue) > self.longest_queue:
                self.longest_queue = len(queue)
        else:
            self._send_run(stream)

    def _send_run(self, stream: SimulatedStream) -> None:
        clock, source, sink, blocks = self._clock, stream.source, stream.sink, stream.queued_blocks
        self._is_uplink_busy[source] = True
        over = clock.now + blocks * self._uplink_block_seconds[source]
        clock.call_at(over, self._run_sent, stream, blocks)
        soonest = clock.now + self.latency
        began = max(self._downlink_free_at[sink], soonest)
        there = max(began + blocks * self._downlink_block_seconds[sink], over + self.latency)
        self._downlink_free_at[sink] = there
        clock.call_at(there, self._run_arrived, stream, blocks)

    def _run_sent(self, stream: SimulatedStream, blocks: int) -> None:
        source, nbytes = stream.source, blocks * self._block_bytes
        self.bytes_up[source] += nbytes
        self.unsent_bytes[source] -= nbytes
        stream.sent_blocks += blocks
        stream.queued_blocks = 0
        self.queue_run(stream)  # the link counts as busy: it goes to the end of the queue
        queue = self._uplink_queues[source]
        while queue:
            following = queue.popleft()
            if not following.is_ended:
                self._send_run(following)
                return
            self.unsent_bytes[source] -= following.queued_blocks * self._block_bytes
            following.queued_blocks = 0
        self._is_uplink_busy[source] = False

    def _run_arrived(self, stream: SimulatedStream, blocks: int) -> None:
        self.bytes_down[stream.sink] += blocks * self._block_bytes
        if stream.is_ended:
            return
        stream.arrived_blocks += blocks
        stream.on_arrival(stream, blocks)
        self.queue_run(stream)
