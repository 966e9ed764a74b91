"""Which flight is next in a cluster: readers before other nodes' prefetch, few stripes of one owner at a time."""

from __future__ import annotations

from typing import Any, cast

from fusecache.fetch.block_source import Route
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.fetch.prefetch_queues import PlannedFile
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.waiter import Waiter
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion

BLOCK = 1 << 16
LANES = ("me", "a", "b") * 4


class Stored:
    """A file of which nothing is there."""

    block_size = BLOCK
    is_complete = False
    missing_block_count = 12

    def __init__(self, blocks: int) -> None:
        self.block_count = blocks

    def is_present(self, block: int) -> bool:
        return False

    def is_unverified(self, block: int) -> bool:
        return False


def make_load(
    name: str, *, window: int = 2, lanes: tuple[str, ...] = LANES, in_order: bool = False
) -> ObjectFetch:
    version = ObjectVersion("o", name, "e", len(lanes) * BLOCK, 1)
    object_fetch = ObjectFetch(version, "", cast(StoredObject, Stored(len(lanes))))
    remote = bytes(lane != "me" for lane in lanes)
    owners = len(set(lanes) - {"me"})
    object_fetch.set_route(Route(1, remote, range(len(lanes)), True, lanes, window, in_order, owners))
    return object_fetch


def wait_for(object_fetch: ObjectFetch, block: int, *, urgent: bool) -> None:
    def settled(_waiter: Waiter) -> None:
        pass

    waiter = Waiter(
        object_fetch.version.key,
        block * BLOCK,
        1,
        missing_blocks=[block],
        waiting_since=0,
        deadline=1e9,
        on_settled=settled,
        urgent=urgent,
    )
    object_fetch.waiters.add(waiter)


def board_of(*loads: ObjectFetch) -> FetchScheduler:
    scheduler = FetchScheduler(4)
    for object_fetch in loads:
        scheduler.prefetches.add_whole_file(object_fetch)
    return scheduler


def test_what_one_slow_owner_has_of_every_file_does_not_stop_the_rest() -> None:
    scheduler = FetchScheduler(4)
    for name in "wxyz":
        scheduler.prefetches.add_whole_file(make_load(name, lanes=("a", "b") * 2))
    scheduler.prefetches.plan_files([(ObjectVersion("o", "next", "e", 1, 1), "")])
    jobs = [take(scheduler, remote=True) for _ in range(4)]
    assert scheduler.next_work(False, 0.0, True) is None, "all owners have enough to do"
    for _ in range(7):
        quick = next(job for job in jobs if job.owner == "b")
        jobs.remove(quick)
        scheduler.flight_ended(quick)
        found = scheduler.next_work(False, 0.0, True)
        if not isinstance(found, FlightPlan):
            break
        jobs.append(found)
    assert found is not None, "of b nothing is left in these files, and it has room"
    assert isinstance(found, PlannedFile)
    assert found.version.key == "next"


def test_no_more_is_fetched_ahead_from_nodes_than_the_link_can_take() -> None:
    object_fetch, most = make_load("x", window=9), 2
    scheduler = FetchScheduler(4, max_prefetch_flights=lambda: most)
    scheduler.prefetches.add_whole_file(object_fetch)
    jobs = [take(scheduler, remote=True) for _ in range(2)]
    assert scheduler.next_work(False, 0.0, True) is None
    assert take(scheduler, remote=False).owner is None
    free = next(block for block in range(12) if object_fetch.idle[block] and object_fetch.is_remote(block))
    wait_for(object_fetch, free, urgent=False)
    scheduler.demand.queue_blocks(object_fetch, [free])
    assert free in take(scheduler, remote=True).blocks, "another node waits for it"
    scheduler.flight_ended(jobs[0])
    jobs.append(take(scheduler, remote=True))
    assert scheduler.next_work(False, 0.0, True) is None
    most = 3
    take(scheduler, remote=True)


def take(scheduler: FetchScheduler, *, remote: bool, demand_only: bool = False) -> FlightPlan:
    job = scheduler.next_work(demand_only, 0.0, remote)
    assert isinstance(job, FlightPlan)
    return job


def test_of_one_owner_only_a_window_is_fetched_ahead() -> None:
    object_fetch = make_load("x")
    scheduler = board_of(object_fetch)
    jobs = [take(scheduler, remote=True) for _ in range(4)]
    assert [job.owner for job in jobs] == ["a", "b", "a", "b"]
    assert scheduler.next_work(False, 0.0, True) is None
    scheduler.flight_ended(jobs[1])
    assert take(scheduler, remote=True).owner == "b"
    assert scheduler.next_work(False, 0.0, True) is None


def test_the_window_holds_over_all_files() -> None:
    first, second = make_load("x", lanes=("a",) * 3), make_load("y", lanes=("b", "a", "b"))
    scheduler = board_of(first, second)
    taken = [take(scheduler, remote=True) for _ in range(4)]
    assert [(job.object_fetch.version.key, job.owner) for job in taken] == [
        ("x", "a"),
        ("x", "a"),
        ("y", "b"),
        ("y", "b"),
    ]
    assert scheduler.next_work(False, 0.0, True) is None


def test_a_reader_does_not_wait_for_the_window() -> None:
    object_fetch = make_load("x", lanes=("a",) * 6)
    scheduler = board_of(object_fetch)
    for _ in range(2):
        take(scheduler, remote=True)
    wait_for(object_fetch, 5, urgent=True)
    scheduler.demand.queue_blocks(object_fetch, [5])
    job = take(scheduler, remote=True)
    assert (job.blocks, job.urgent, job.owner) == (range(5, 6), True, None)


def test_readers_go_before_the_prefetch_of_other_nodes_and_that_before_our_own() -> None:
    object_fetch = make_load("x")
    scheduler = board_of(object_fetch)
    wait_for(object_fetch, 3, urgent=False)
    wait_for(object_fetch, 6, urgent=True)
    scheduler.demand.queue_blocks(object_fetch, [3, 6])
    jobs = [take(scheduler, remote=False) for _ in range(3)]
    assert [(job.blocks.start, job.urgent) for job in jobs] == [(6, True), (3, False), (0, False)]


def test_the_threads_kept_for_readers_leave_the_prefetch_of_others_alone() -> None:
    object_fetch = make_load("x")
    scheduler = board_of(object_fetch)
    wait_for(object_fetch, 3, urgent=False)
    scheduler.demand.queue_blocks(object_fetch, [3])
    assert scheduler.next_work(True, 0.0, False) is None
    wait_for(object_fetch, 0, urgent=True)
    scheduler.demand.queue_blocks(object_fetch, [0])
    assert take(scheduler, remote=False, demand_only=True).blocks == range(1)
    assert take(scheduler, remote=False).blocks == range(3, 4)


def test_a_plan_goes_before_the_prefetch_of_other_nodes() -> None:
    object_fetch = make_load("x")
    scheduler = board_of(object_fetch)
    ran: list[Any] = []
    scheduler.timed.tasks.append(lambda: ran.append(1))
    wait_for(object_fetch, 3, urgent=False)
    scheduler.demand.queue_blocks(object_fetch, [3])
    task = scheduler.next_work(False, 0.0, False)
    assert callable(task)
    task()
    assert ran == [1]
    assert take(scheduler, remote=False).blocks == range(3, 4)


def test_the_next_file_begins_while_the_owners_of_this_one_are_asked() -> None:
    object_fetch = make_load("x", lanes=("a",) * 6)
    scheduler = board_of(object_fetch)
    scheduler = FetchScheduler(4)
    scheduler.prefetches.add_whole_file(object_fetch)
    scheduler.prefetches.plan_files([(ObjectVersion("o", "y", "e", 1, 1), "")])
    for _ in range(2):
        take(scheduler, remote=True)
    begin = scheduler.next_work(False, 0.0, True)
    assert isinstance(begin, PlannedFile)
    assert begin.version.key == "y"


def test_in_a_large_cluster_our_own_stripes_wait_for_their_turn() -> None:
    object_fetch, behind = make_load("x", in_order=True), make_load("y", in_order=True)
    scheduler = board_of(object_fetch, behind)
    scheduler.prefetches.planned_files.append(PlannedFile(behind.version, ""))
    assert take(scheduler, remote=False).blocks == range(1)
    assert scheduler.next_work(False, 0.0, False) is None
    assert take(scheduler, remote=True).blocks == range(1, 2)
    assert scheduler.next_work(False, 0.0, False) is None
    assert take(scheduler, remote=True).blocks == range(2, 3)
    assert take(scheduler, remote=False).blocks == range(3, 4)
    # somebody who waits for one does not wait for its turn
    wait_for(object_fetch, 9, urgent=False)
    scheduler.demand.queue_blocks(object_fetch, [9])
    assert take(scheduler, remote=False).blocks == range(9, 10)
    assert scheduler.next_work(False, 0.0, False) is None


def test_the_last_of_our_own_stripes_wait_for_nobody() -> None:
    object_fetch = make_load("x", lanes=("a", "me", "me"), in_order=True)
    scheduler = board_of(object_fetch, make_load("y", in_order=True))
    assert scheduler.next_work(False, 0.0, False) is None
    take(scheduler, remote=True)
    jobs = [take(scheduler, remote=False) for _ in range(3)]
    assert [(job.object_fetch.version.key, job.blocks.start) for job in jobs] == [
        ("x", 1),
        ("x", 2),
        ("y", 0),
    ]
