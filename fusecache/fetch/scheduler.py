"""The order of all work. Guarded by the scheduling lock; does no I/O.

Order: a block with a reader, and the idle blocks behind it; tasks; the same for a block that another node's prefetch
waits for; headers; then blocks without a waiter (prefetch_queues.py): in turn, the next run ahead of each reader and
the next one of an order that is followed; the other files, one after the other, so that the first of them is whole soon
and can be read while the next one comes; a planned file; when no reader has asked for anything for a while, what
prefetch masks left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from fusecache.fetch.demand_queues import DemandQueues
from fusecache.fetch.object_fetch import FlightPlan
from fusecache.fetch.prefetch_queues import PlannedFile, PrefetchQueues
from fusecache.fetch.timed_work import TimedWork


class FetchScheduler:
    """The work of one service. `max_flight_blocks` is in blocks; `origin_workers` threads fetch from the origin; at
    most `max_prefetch_flights()` flights from other nodes have no waiter. All methods, and those of the three parts,
    are called with the scheduling lock."""

    def __init__(
        self,
        max_flight_blocks: int,
        *,
        origin_workers: int = 16,
        max_prefetch_flights: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self.prefetches = PrefetchQueues(
            max_flight_blocks, origin_workers=origin_workers, max_prefetch_flights=max_prefetch_flights
        )
        self.demand = DemandQueues(self.prefetches.flight_limit)
        self.timed = TimedWork()

    def next_work(
        self, demand_only: bool, now: float, remote: bool = False
    ) -> FlightPlan | PlannedFile | Callable[[], None] | None:
        """The next thing to do: blocks that come from other nodes, or all the rest; with `demand_only` only blocks with
        a reader. Threads of the two kinds never do each other's work: all threads of all nodes could wait for one
        another."""
        plan = self.demand.next_reader_flight(remote)
        if plan is not None or demand_only:
            return plan
        if self.timed.tasks and not remote:
            return self.timed.tasks.popleft()
        plan = self.demand.next_peer_flight(remote)
        if plan is not None or self.prefetches.is_paused:
            return plan
        return self.demand.next_header_flight(remote) or self.prefetches.next_work(now, remote)

    def flight_ended(self, plan: FlightPlan) -> None:
        """This flight is over."""
        plan.object_fetch.flight_ended()
        self.prefetches.flight_ended(plan)

    def pause_prefetch(self) -> None:
        """Forget all work without a waiter, and take no more of it."""
        self.prefetches.pause()
        self.timed.tasks.clear()

    def progress(self) -> dict[str, int]:
        """Figures for `fusecache status`."""
        return {
            "fetching": len(self.prefetches.whole_files),
            "planned": len(self.prefetches.planned_files),
            "replaying": len(self.prefetches.ordered_runs),
            "bytes_to_fetch": sum(
                object_fetch.idle.count(1) * object_fetch.stored.block_size
                for object_fetch in self.prefetches.whole_files
            ),
        }
