"""Which flight is next in a cluster: readers before other nodes' prefetch, few stripes of one owner at a time."""

from __future__ import annotations

from typing import Any, cast

from fusecache.loader.board import Board
from fusecache.loader.interface import Route
from fusecache.loader.load import Job, ObjectLoad
from fusecache.loader.waiters import Waiter
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion

BLOCK = 1 << 16
LANES = ("me", "a", "b") * 4


class Stored:
    """A file of which nothing is there."""

    block_size = BLOCK
    complete = False
    missing = 12

    def __init__(self, blocks: int) -> None:
        self.block_count = blocks

    def present(self, block: int) -> bool:
        return False

    def unverified(self, block: int) -> bool:
        return False


def make_load(
    name: str, *, window: int = 2, lanes: tuple[str, ...] = LANES, in_order: bool = False
) -> ObjectLoad:
    version = ObjectVersion("o", name, "e", len(lanes) * BLOCK, 1)
    load = ObjectLoad(version, "", cast(StoredObject, Stored(len(lanes))))
    remote = bytes(lane != "me" for lane in lanes)
    owners = len(set(lanes) - {"me"})
    load.follow(Route(1, remote, range(len(lanes)), True, lanes, window, in_order, owners))
    return load


def wait_for(load: ObjectLoad, block: int, *, urgent: bool) -> None:
    def settled(_waiter: Waiter) -> None:
        pass

    waiter = Waiter(
        load, block * BLOCK, 1, missing=[block], since=0, deadline=1e9, settled=settled, urgent=urgent
    )
    load.waiting.setdefault(block, []).append(waiter)


def board_of(*loads: ObjectLoad) -> Board:
    board = Board(4, lambda version, source: None)
    for load in loads:
        board.activate(load)
    return board


def test_what_one_slow_owner_has_of_every_file_does_not_stop_the_rest() -> None:
    begun: list[str] = []
    board = Board(4, lambda version, source: begun.append(version.key))
    for name in "wxyz":
        board.activate(make_load(name, lanes=("a", "b") * 2))
    board.ahead.append((ObjectVersion("o", "next", "e", 1, 1), ""))
    jobs = [take(board, remote=True) for _ in range(4)]
    assert board.take(False, 0.0, True) is None, "all owners have enough to do"
    for _ in range(7):
        quick = next(job for job in jobs if job.lane == "b")
        jobs.remove(quick)
        board.ended(quick)
        found = board.take(False, 0.0, True)
        if not isinstance(found, Job):
            break
        jobs.append(found)
    assert found is not None, "of b nothing is left in these files, and it has room"
    assert not isinstance(found, Job)
    found()
    assert begun == ["next"]


def test_no_more_is_fetched_ahead_from_nodes_than_the_link_can_take() -> None:
    load, most = make_load("x", window=9), 2
    board = Board(4, lambda version, source: None, abreast=lambda: most)
    board.activate(load)
    jobs = [take(board, remote=True) for _ in range(2)]
    assert board.take(False, 0.0, True) is None
    assert take(board, remote=False).lane is None
    free = next(block for block in range(12) if load.idle[block] and load.is_remote(block))
    wait_for(load, free, urgent=False)
    board.call_for(load, [free])
    assert free in take(board, remote=True).blocks, "another node waits for it"
    board.ended(jobs[0])
    jobs.append(take(board, remote=True))
    assert board.take(False, 0.0, True) is None
    most = 3
    take(board, remote=True)


def take(board: Board, *, remote: bool, demand_only: bool = False) -> Job:
    job = board.take(demand_only, 0.0, remote)
    assert isinstance(job, Job)
    return job


def test_of_one_owner_only_a_window_is_fetched_ahead() -> None:
    load = make_load("x")
    board = board_of(load)
    jobs = [take(board, remote=True) for _ in range(4)]
    assert [job.lane for job in jobs] == ["a", "b", "a", "b"]
    assert board.take(False, 0.0, True) is None
    board.ended(jobs[1])
    assert take(board, remote=True).lane == "b"
    assert board.take(False, 0.0, True) is None


def test_the_window_holds_over_all_files() -> None:
    first, second = make_load("x", lanes=("a",) * 3), make_load("y", lanes=("b", "a", "b"))
    board = board_of(first, second)
    taken = [take(board, remote=True) for _ in range(4)]
    assert [(job.load.version.key, job.lane) for job in taken] == [
        ("x", "a"), ("x", "a"), ("y", "b"), ("y", "b"),
    ]  # fmt: skip
    assert board.take(False, 0.0, True) is None


def test_a_reader_does_not_wait_for_the_window() -> None:
    load = make_load("x", lanes=("a",) * 6)
    board = board_of(load)
    for _ in range(2):
        take(board, remote=True)
    wait_for(load, 5, urgent=True)
    board.call_for(load, [5])
    job = take(board, remote=True)
    assert (job.blocks, job.urgent, job.lane) == (range(5, 6), True, None)


def test_readers_go_before_the_prefetch_of_other_nodes_and_that_before_our_own() -> None:
    load = make_load("x")
    board = board_of(load)
    wait_for(load, 3, urgent=False)
    wait_for(load, 6, urgent=True)
    board.call_for(load, [3, 6])
    jobs = [take(board, remote=False) for _ in range(3)]
    assert [(job.blocks.start, job.urgent) for job in jobs] == [(6, True), (3, False), (0, False)]


def test_the_threads_kept_for_readers_leave_the_prefetch_of_others_alone() -> None:
    load = make_load("x")
    board = board_of(load)
    wait_for(load, 3, urgent=False)
    board.call_for(load, [3])
    assert board.take(True, 0.0, False) is None
    wait_for(load, 0, urgent=True)
    board.call_for(load, [0])
    assert take(board, remote=False, demand_only=True).blocks == range(1)
    assert take(board, remote=False).blocks == range(3, 4)


def test_a_plan_goes_before_the_prefetch_of_other_nodes() -> None:
    load = make_load("x")
    board = board_of(load)
    ran: list[Any] = []
    board.tasks.append(lambda: ran.append(1))
    wait_for(load, 3, urgent=False)
    board.call_for(load, [3])
    task = board.take(False, 0.0, False)
    assert callable(task)
    task()
    assert ran == [1]
    assert take(board, remote=False).blocks == range(3, 4)


def test_the_next_file_begins_while_the_owners_of_this_one_are_asked() -> None:
    load = make_load("x", lanes=("a",) * 6)
    board = board_of(load)
    begun: list[str] = []
    board = Board(4, lambda version, source: begun.append(version.key))
    board.activate(load)
    board.ahead.append((ObjectVersion("o", "y", "e", 1, 1), ""))
    for _ in range(2):
        take(board, remote=True)
    begin = board.take(False, 0.0, True)
    assert callable(begin)
    begin()
    assert begun == ["y"]


def test_in_a_large_cluster_our_own_stripes_wait_for_their_turn() -> None:
    load, behind = make_load("x", in_order=True), make_load("y", in_order=True)
    board = board_of(load, behind)
    board.ahead.append((behind.version, ""))
    assert take(board, remote=False).blocks == range(1)
    assert board.take(False, 0.0, False) is None
    assert take(board, remote=True).blocks == range(1, 2)
    assert board.take(False, 0.0, False) is None
    assert take(board, remote=True).blocks == range(2, 3)
    assert take(board, remote=False).blocks == range(3, 4)
    # somebody who waits for one does not wait for its turn
    wait_for(load, 9, urgent=False)
    board.call_for(load, [9])
    assert take(board, remote=False).blocks == range(9, 10)
    assert board.take(False, 0.0, False) is None


def test_the_last_of_our_own_stripes_wait_for_nobody() -> None:
    load = make_load("x", lanes=("a", "me", "me"), in_order=True)
    board = board_of(load, make_load("y", in_order=True))
    assert board.take(False, 0.0, False) is None
    take(board, remote=True)
    jobs = [take(board, remote=False) for _ in range(3)]
    assert [(job.load.version.key, job.blocks.start) for job in jobs] == [("x", 1), ("x", 2), ("y", 0)]
