"""One simulated node: the project's own scheduling, a reader, and the two sides of its exchange.

FetchScheduler and ObjectFetch decide what is fetched next; this module feeds them as FetchService does. A flight stands
for the thread that does it; there are as many as FetchService starts threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from benchmarks.cluster.simulation_client import SimulatedClient
from benchmarks.cluster.simulation_peer import SimulatedPeer, SimulatedTransfer
from benchmarks.cluster.simulation_server import SimulatedServer
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.fetch.prefetch_queues import PlannedFile
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.settings import FetchSettings
from fusecache.fetch.waiter import Waiter
from fusecache.fetch.worker_pool import count_workers
from fusecache.throughput import Throughput
from fusecache.types import ObjectVersion
from fusecache_mount.fs.open_wait import OpenWaitPolicy

OPEN_WAIT_POLL_EVERY = 0.05
"""Seconds between two looks of an open that waits at how long its file still takes."""
READ_BYTES = 4 << 20
"""Bytes that the reader asks for at a time."""
_WAITER_DEADLINE = FetchSettings().deadline


class SimulatedReader:
    """Reads all files of the model on one node, one after the other, as an engine does.

    | State | Event | Next |
    |---|---|---|
    | waits for the open (`_opened_at`) | the file is whole, or takes too long | reads |
    | reads | blocks are missing | waits for them |
    | waits for blocks | they arrive | reads |
    | reads | the file ends | waits for the open of the next, or is done (`done_at`) |
    """

    def __init__(
        self,
        peer: SimulatedPeer,
        scheduler: FetchScheduler,
        throughput: Throughput,
        *,
        begin_fetch: Callable[[ObjectVersion], None],
        assign_work: Callable[[], None],
    ) -> None:
        """`begin_fetch` has all of a file fetched, `assign_work` gives idle threads what there is to do."""
        self.done_at: float | None = None
        """When everything was read, in simulated seconds."""
        self._peer = peer
        self._world = peer.world
        self._scheduler = scheduler
        self._throughput = throughput
        self._begin_fetch = begin_fetch
        self._assign_work = assign_work
        self._file = 0
        self._opened_at: float | None = None
        self._open_wait = OpenWaitPolicy(0.0, 0.0)
        self._read_position = 0

    def open_file(self) -> None:
        """Open the next file: wait until it is whole, if that does not take too long."""
        self._opened_at = self._world.clock.now
        self._open_wait = OpenWaitPolicy(self._world.setting.open_wait, self._opened_at)
        self._read_position = 0
        self._begin_fetch(self._world.files[self._file])
        self._check_open_wait(self._file)

    def _check_open_wait(self, file: int) -> None:
        if self._peer.is_dead or file != self._file or self._opened_at is None:
            return
        object_fetch, now = self._peer.fetch_of(file), self._world.clock.now
        if object_fetch.stored.is_complete:
            self._read_on()
            return
        rate = self._throughput.bytes_per_second(now)
        left: float | None = None
        if object_fetch not in self._scheduler.prefetches.whole_files or object_fetch.stays_partial():
            left = math.inf
        elif rate:
            left = self._scheduler.prefetches.bytes_until_complete(object_fetch) / rate
        if self._open_wait.check_wait_over(now, left):
            self._opened_at = None
            object_fetch.reader_asked(0)
            self._read_on()
            self._assign_work()
        else:
            self._world.clock.call_at(now + OPEN_WAIT_POLL_EVERY, self._check_open_wait, file)

    def file_completed(self, file: int) -> None:
        """All blocks of a file have arrived."""
        if file != self._file:
            return
        if self._opened_at is not None:
            self._check_open_wait(file)
        else:
            self._read_on()

    def _read_on(self) -> None:
        """Read what is there, and ask for what comes next."""
        object_fetch = self._peer.fetch_of(self._file)
        stored = object_fetch.stored
        while not stored.is_complete:
            stop = min(stored.block_count, self._read_position + max(1, READ_BYTES // stored.block_size))
            object_fetch.reader_asked(stop)
            missing = [block for block in range(self._read_position, stop) if not stored.is_present(block)]
            if missing:
                now = self._world.clock.now
                waiter = Waiter(
                    object_fetch.version.key,
                    0,
                    0,
                    missing_blocks=missing,
                    waiting_since=now,
                    deadline=now + _WAITER_DEADLINE,
                    on_settled=self._waiter_settled,
                )
                object_fetch.waiters.add(waiter)
                self._scheduler.demand.queue_blocks(object_fetch, missing)
                return
            self._read_position = stop
            if stop == stored.block_count:
                break
        self._file += 1
        if self._file < len(self._world.files):
            self.open_file()
            self._assign_work()
        elif self.done_at is None:
            self.done_at = self._world.clock.now
            if self._peer.number not in self._world.dying_nodes:
                self._world.node_finished()

    def _waiter_settled(self, _waiter: Waiter) -> None:
        # not at once: the block that has just arrived is still being reported
        self._world.clock.call_at(self._world.clock.now, self._resume_reading, self._file)

    def _resume_reading(self, file: int) -> None:
        if not self._peer.is_dead and file == self._file and self._opened_at is None:
            self._read_on()
            self._assign_work()


class SimulatedNode:
    """Puts one node together: `peers` are the states of all nodes, `servers` their sending sides."""

    def __init__(
        self, peer: SimulatedPeer, peers: Sequence[SimulatedPeer], servers: Sequence[SimulatedServer]
    ) -> None:
        setting = peer.world.setting
        self.server = SimulatedServer(peer, peers, self._fetch_for_peer)
        self._peer = peer
        self._world = peer.world
        self._client = SimulatedClient(
            peer, self.server, servers, on_blocks=self._keep_blocks, on_ended=self._transfer_ended
        )
        # FetchScheduler and ObjectFetch ask their store for no more than SimulatedStoredObject has.
        self._scheduler = FetchScheduler(
            max(1, setting.stripe // setting.block),
            max_prefetch_flights=self._client.max_prefetch_flights,
        )
        self._throughput = Throughput()
        self._reader = SimulatedReader(
            peer,
            self._scheduler,
            self._throughput,
            begin_fetch=self._begin_fetch,
            assign_work=self._assign_work,
        )
        self._idle_workers = [
            list(counts) for counts in count_workers(setting.concurrency, setting.peer_workers)
        ]
        """Per kind (0: from the origin, 1: from nodes) the idle threads: those for everything, those for demand."""
        self._is_assigning_work = False

    @property
    def done_at(self) -> float | None:
        """When the node's reader had everything, in simulated seconds; None: it has not."""
        return self._reader.done_at

    def start_reading(self) -> None:
        """A reader opens the first file; the others are fetched after it."""
        self._reader.open_file()
        self._scheduler.prefetches.plan_files((version, "") for version in self._world.files[1:])
        self._assign_work()

    def poll_transfers(self) -> None:
        """Begin to poll the flights."""
        self._client.poll_transfers()

    def _begin_fetch(self, version: ObjectVersion) -> None:
        object_fetch = self._peer.fetch_of(self._world.file_number_by_id[version.id])
        object_fetch.want_whole()
        self._scheduler.prefetches.add_whole_file(object_fetch)

    def _fetch_for_peer(self, file: int, block: int, is_urgent: bool) -> None:
        """Another node waits for this block."""
        object_fetch, now = self._peer.fetch_of(file), self._world.clock.now
        size = object_fetch.stored.block_size
        waiter = Waiter(
            object_fetch.version.key,
            block * size,
            size,
            missing_blocks=[block],
            waiting_since=now,
            deadline=now + _WAITER_DEADLINE,
            on_settled=lambda _waiter: None,
            urgent=is_urgent,
        )
        object_fetch.waiters.add(waiter)
        self._scheduler.demand.queue_blocks(object_fetch, [block])
        self._assign_work()

    # -- threads

    def _assign_work(self) -> None:
        """Idle threads take what there is to do."""
        if self._is_assigning_work or self._peer.is_dead:
            return
        self._is_assigning_work = True
        for remote in (
            True,
            False,
            True,
        ):  # what one kind of threads takes or begins may be the turn of the other
            idle = self._idle_workers[remote]
            while idle[0]:
                work = self._scheduler.next_work(False, self._world.clock.now, remote)
                if work is None:
                    break
                if isinstance(work, PlannedFile):
                    self._begin_fetch(work.version)
                    continue
                assert isinstance(work, FlightPlan), "no node of the simulation has tasks"
                idle[0] -= 1
                self._client.start_transfer(work, is_from_peer=remote, demand_only=False)
            while idle[1] and self._scheduler.demand.has_blocks(remote):
                work = self._scheduler.next_work(True, self._world.clock.now, remote)
                if not isinstance(work, FlightPlan):
                    break
                idle[1] -= 1
                self._client.start_transfer(work, is_from_peer=remote, demand_only=True)
        self._is_assigning_work = False

    def _keep_blocks(self, transfer: SimulatedTransfer, blocks: range) -> None:
        """Store blocks that have arrived, and wake the readers that wait for them."""
        stored = self._peer.stored_of(transfer.file)
        for block in blocks:
            if not stored.add_block(block):
                self._world.counters.duplicate_bytes += stored.block_size
            for waiter in transfer.object_fetch.block_arrived(block, None):
                waiter.on_settled(waiter)
        self._throughput.add_arrival(self._world.clock.now, len(blocks) * stored.block_size)

    def _transfer_ended(self, transfer: SimulatedTransfer) -> None:
        """The thread of a flight is idle again."""
        object_fetch = transfer.object_fetch
        self._scheduler.flight_ended(transfer.plan)
        self._idle_workers[transfer.is_from_peer][transfer.demand_only] += 1
        self._queue_again(object_fetch, transfer.remaining)
        if object_fetch.stored.is_complete:
            self._scheduler.prefetches.drop_file(object_fetch)
            self._reader.file_completed(transfer.file)
        self._assign_work()

    def _queue_again(self, object_fetch: ObjectFetch, remaining: range) -> None:
        if remaining:
            self._scheduler.demand.queue_blocks(object_fetch, object_fetch.return_blocks(remaining))

    # -- deaths

    def lose_power(self) -> None:
        """The power fails."""
        self._peer.lose_power()
        self._client.lose_power()
        self.server.lose_power()

    def notice_deaths(self, view_number: int) -> None:
        """The membership publishes this view of the members: routes and demand are made anew."""
        if self._peer.is_dead:
            return
        self._peer.notice_deaths(view_number)
        for object_fetch in self._peer.fetches.values():
            self._scheduler.demand.queue_blocks(object_fetch, list(object_fetch.waiters.by_block))
        self._assign_work()
