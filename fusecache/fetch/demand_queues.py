"""Blocks with a waiter that no flight has taken yet. Guarded by the scheduling lock; does no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch

_Queues = tuple[deque[tuple[ObjectFetch, int]], deque[tuple[ObjectFetch, int]]]
"""Blocks that come from the origin or are in the data file already, and blocks that come from other nodes."""


class DemandQueues:
    """Three kinds of demand, each in the order in which it was asked for: of readers, of other nodes' prefetch, and of
    headers, for which no reader waits. `flight_limit` says how many blocks the next flight of a fetch has at most. All
    methods are called with the scheduling lock.

    | Block | Event | Next state |
    |---|---|---|
    | unknown | `queue_blocks`, and it is idle | queued |
    | queued | its turn comes, it is idle and has a waiter | taken by a flight |
    | queued | its turn comes, and another flight has it, or its waiters went away | unknown |
    | queued | its turn comes, and a new route says that it comes from elsewhere | queued there |
    """

    def __init__(self, flight_limit: Callable[[ObjectFetch], int]) -> None:
        self._flight_limit = flight_limit
        self._of_readers: _Queues = (deque(), deque())
        self._of_peers: _Queues = (deque(), deque())
        self._of_headers: _Queues = (deque(), deque())

    def has_blocks(self, remote: bool) -> bool:
        """Whether a reader or another node may be waiting for a block of this kind that no flight has taken."""
        return bool(self._of_readers[remote] or self._of_peers[remote])

    def queue_blocks(
        self, object_fetch: ObjectFetch, blocks: Iterable[int], *, is_header: bool = False
    ) -> bool:
        """These blocks have a waiter; returns whether one of them is idle, so that there is work to do. `is_header`:
        they hold a header, and no reader waits."""
        is_queued = False
        for block in blocks:
            if object_fetch.idle[block]:
                queues = (
                    self._of_headers
                    if is_header
                    else self._of_readers
                    if object_fetch.waiters.has_urgent(block)
                    else self._of_peers
                )
                queues[object_fetch.is_remote(block)].append((object_fetch, block))
                is_queued = True
        return is_queued

    def next_reader_flight(self, remote: bool) -> FlightPlan | None:
        """The flight for the block that a reader has waited for the longest time; None: there is none."""
        return self._next_flight(self._of_readers, remote)

    def next_peer_flight(self, remote: bool) -> FlightPlan | None:
        """The same for the prefetch of other nodes."""
        return self._next_flight(self._of_peers, remote)

    def next_header_flight(self, remote: bool) -> FlightPlan | None:
        """The same for headers."""
        return self._next_flight(self._of_headers, remote)

    def _next_flight(self, queues: _Queues, remote: bool) -> FlightPlan | None:
        queue = queues[remote]
        while queue:
            object_fetch, block = queue.popleft()
            if not (object_fetch.idle[block] and block in object_fetch.waiters.by_block):
                continue
            if object_fetch.is_remote(block) is not remote:
                queues[not remote].append((object_fetch, block))
                continue
            limit = self._flight_limit(object_fetch)
            if queues is self._of_headers:
                # no more of it: the headers of the other files come before the tensors of this one
                limit = next(
                    n
                    for n in range(1, limit + 1)
                    if n == limit or block + n not in object_fetch.waiters.by_block
                )
            return object_fetch.plan_flight(block, limit, urgent=queues is self._of_readers)
        return None
