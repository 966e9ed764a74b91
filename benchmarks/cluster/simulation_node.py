"""One simulated node: the project's own scheduling, joined by what stands in for threads, sockets and disks.

What is fetched next is decided by Board and ObjectFetch (fusecache/loader), where from by choice.turns and
choice.Asking, who passes what on by choice.Spread, all of them fed as Loader, Exchange and Holdings feed them. A flight
is a generator that stands for the thread that does it. The crews have the sizes that Loader.start gives them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from benchmarks.cluster.simulation_network import SimulatedStream
from benchmarks.cluster.simulation_server import SimulatedRequest, SimulatedServer
from benchmarks.cluster.simulation_world import SimulatedWorld
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.fetch.prefetch_queues import PlannedFile
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.waiter import Waiter
from fusecache.peers.exchange import policy
from fusecache.peers.exchange.breaker import CircuitBreaker, SpeedComparison
from fusecache.peers.member import Member
from fusecache.throughput import PeakThroughput, Throughput
from fusecache.types import ObjectVersion
from fusecache_mount.fs.open_wait import OpenWaitPolicy

NOT_STORED_TTL = 10.0
POLL_EVERY = 1.0
SUBSTITUTE_AFTER = 6.0
SUBSTITUTE_LOADED_AFTER = 18.0
RANDOM_CANDIDATES = 2
HEDGES_PER_POLL = 2
"""Per second, at whether others have what is waited for."""
DEATH_NOTICED_AFTER = (2.5, 3.5)
"""Seconds after which a dead node is known to be: a connection that is not made (peers.timeout), and a second look."""
OPEN_WAIT = 5.0
OPEN_WAIT_POLL_EVERY = 0.05
READ_BYTES = 4 << 20
"""As in exchange.py, membership.py and the option open_wait."""

TransferSteps = Generator[None, tuple[str, Member | None], None]


class SimulatedStoredObject:
    """Stands for a file of the store: which blocks are there."""

    def __init__(self, block_count: int, block_size: int) -> None:
        self.block_count = block_count
        self.block_size = block_size
        self.there = bytearray(block_count)
        self.missing_block_count = block_count

    @property
    def is_complete(self) -> bool:
        """See StoredObject."""
        return not self.missing_block_count

    def is_present(self, block: int) -> bool:
        """See StoredObject."""
        return self.there[block] != 0

    def is_unverified(self, block: int) -> bool:
        """See StoredObject: nothing is left of an earlier run."""
        return False

    def has(self, blocks: range) -> bool:
        """Whether all of these are there."""
        return self.there.find(0, blocks.start, blocks.stop) < 0


@dataclass(eq=False)
class SimulatedTransfer:
    """See exchange.py."""

    plan: FlightPlan
    object_fetch: ObjectFetch
    file: int
    stripe: int
    is_from_peer: bool
    demand_only: bool
    next_block: int
    failed_nodes: list[str] = field(default_factory=list)
    substitutes: Sequence[Member] = ()
    member: Member | None = None
    started_at: float = 0.0
    stored_only: bool = False
    reported_block: int = 0
    reported_at: float = 0.0
    all_stored: bool = False
    stream: SimulatedStream | None = None
    wait_number: int = 0
    """Grows with each thing that is waited for: what comes of an earlier one is not listened to."""

    @property
    def remaining(self) -> range:
        return range(self.next_block, self.plan.blocks.stop)


class SimulatedNode:
    """One node of `world`; `nodes` are all of them."""

    def __init__(self, world: SimulatedWorld, number: int, nodes: Sequence[SimulatedNode]) -> None:
        setting = world.setting
        self.world = world
        self.number = number
        self.name = world.member_views[0][number].name
        self.nodes = nodes
        self.view_number = 0
        self.is_dead = False
        self.done_at: float | None = None
        self.fetch_by_file: dict[int, ObjectFetch] = {}
        self.steps_by_transfer: dict[SimulatedTransfer, TransferSteps] = {}
        self.upstream_by_stripe: dict[tuple[int, int], str] = {}
        self.transfers_in_progress = 0
        self.server = SimulatedServer(self)
        self.breaker = CircuitBreaker(lambda: world.clock.now)
        self.speeds = SpeedComparison(lambda: world.clock.now)
        # Board and ObjectFetch ask their store for no more than Stored has.
        self.scheduler = FetchScheduler(
            max(1, setting.stripe // setting.block),
            max_prefetch_flights=self._max_prefetch_flights,
        )
        self.throughput = Throughput()
        self.peak_throughput = PeakThroughput()
        """Of what other nodes give."""
        reserved = [max(1, setting.concurrency // 4), setting.peer_workers // 4]
        self._idle_workers = [
            [max(2, setting.concurrency) - reserved[0], reserved[0]],
            [setting.peer_workers - reserved[1], reserved[1]],
        ]
        """Per kind (0: from the origin, 1: from nodes) the idle threads: those for everything, those for demand."""
        self._is_assigning_work = False
        self._origin_slots_used = [0, 0]
        self._origin_queues: list[deque[SimulatedTransfer]] = [deque(), deque()]
        """For requests to the origin: of others' stripes, of our own."""
        self._not_stored_at: dict[tuple[str, int], float] = {}
        self._file_being_read = 0
        self._opened_at: float | None = None
        self._open_wait = OpenWaitPolicy(0.0, 0.0)
        self._read_position = 0

    # -- reading

    def start_reading(self) -> None:
        """A reader opens the first file; the others are fetched after it."""
        self._open_file()
        self.scheduler.prefetches.plan_files((version, "") for version in self.world.files[1:])
        self.assign_work()

    def _open_file(self) -> None:
        """See OpenFiles._await_completion."""
        self._opened_at = self.world.clock.now
        self._open_wait = OpenWaitPolicy(OPEN_WAIT, self._opened_at)
        self._read_position = 0
        self._begin_fetch(self.world.files[self._file_being_read])
        self._check_open_wait(self._file_being_read)

    def _check_open_wait(self, file: int) -> None:
        if self.is_dead or file != self._file_being_read or self._opened_at is None:
            return
        object_fetch, now = self.fetch_of(file), self.world.clock.now
        if object_fetch.stored.is_complete:
            self._read_on()
            return
        pace = self.throughput.bytes_per_second(now)
        left: float | None = None
        if object_fetch not in self.scheduler.prefetches.whole_files or object_fetch.stays_partial():
            left = math.inf
        elif pace:
            left = self.scheduler.prefetches.bytes_until_complete(object_fetch) / pace
        if self._open_wait.check_wait_over(now, left):
            self._opened_at = None
            object_fetch.reader_asked(0)
            self._read_on()
            self.assign_work()
        else:
            self.world.clock.call_at(now + OPEN_WAIT_POLL_EVERY, self._check_open_wait, file)

    def _read_on(self) -> None:
        """The reader takes what is there, and asks for what comes next."""
        object_fetch = self.fetch_of(self._file_being_read)
        stored = object_fetch.stored
        while not stored.is_complete:
            stop = min(stored.block_count, self._read_position + max(1, READ_BYTES // stored.block_size))
            object_fetch.reader_asked(stop)
            missing = [block for block in range(self._read_position, stop) if not stored.is_present(block)]
            if missing:
                now = self.world.clock.now
                waiter = Waiter(
                    object_fetch.version.key,
                    0,
                    0,
                    missing_blocks=missing,
                    waiting_since=now,
                    deadline=now + 60.0,
                    on_settled=self._waiter_settled,
                )
                object_fetch.waiters.add(waiter)
                self.scheduler.demand.queue_blocks(object_fetch, missing)
                return
            self._read_position = stop
            if stop == stored.block_count:
                break
        self._file_being_read += 1
        if self._file_being_read < len(self.world.files):
            self._open_file()
            self.assign_work()
        elif self.done_at is None:
            self.done_at = self.world.clock.now
            if self.number not in self.world.dying_nodes:
                self.world.node_finished()

    def _waiter_settled(self, _waiter: Waiter) -> None:
        # not at once: the block that has just landed is still being told of
        self.world.clock.call_at(self.world.clock.now, self._resume_reading, self._file_being_read)

    def _resume_reading(self, file: int) -> None:
        if not self.is_dead and file == self._file_being_read and self._opened_at is None:
            self._read_on()
            self.assign_work()

    def fetch_of(self, file: int) -> ObjectFetch:
        """Of this file, made at the first call."""
        object_fetch = self.fetch_by_file.get(file)
        if object_fetch is None:
            version, block = self.world.files[file], self.world.setting.block
            stored = SimulatedStoredObject(-(-version.size // block), block)
            object_fetch = self.fetch_by_file[file] = ObjectFetch(version, "", stored)  # type: ignore[arg-type]
            self._set_route(object_fetch)
        return object_fetch

    def _set_route(self, object_fetch: ObjectFetch) -> None:
        setting, members = self.world.setting, self.world.member_views[self.view_number]
        object_fetch.set_route(
            policy.build_route(
                object_fetch.version,
                setting.block,
                setting.stripe,
                members,
                self.name,
                owners=self.world.stripe_owners,
            )
        )

    def _begin_fetch(self, version: ObjectVersion) -> None:
        object_fetch = self.fetch_of(self.world.file_number_by_id[version.id])
        object_fetch.want_whole()
        self.scheduler.prefetches.add_whole_file(object_fetch)

    # -- the crew

    def assign_work(self) -> None:
        """Idle threads take what there is to do."""
        if self._is_assigning_work or self.is_dead:
            return
        self._is_assigning_work = True
        for remote in (True, False, True):  # what one crew takes or begins may be the turn of the other
            free = self._idle_workers[remote]
            while free[0]:
                job = self.scheduler.next_work(False, self.world.clock.now, remote)
                if job is None:
                    break
                if isinstance(job, PlannedFile):
                    self._begin_fetch(job.version)
                    continue
                assert isinstance(job, FlightPlan), "no node of the simulation has tasks"
                free[0] -= 1
                self._start_transfer(job, remote, False)
            while free[1] and self.scheduler.demand.has_blocks(remote):
                job = self.scheduler.next_work(True, self.world.clock.now, remote)
                if not isinstance(job, FlightPlan):
                    break
                free[1] -= 1
                self._start_transfer(job, remote, True)
        self._is_assigning_work = False

    def _max_prefetch_flights(self) -> int:
        """See PeerBlockSource.max_prefetch_flights."""
        return self.server.receiver_rates.max_prefetch_flights(
            self.peak_throughput.bytes_per_second(self.world.clock.now), self.world.setting.peer_workers
        )

    def _start_transfer(self, plan: FlightPlan, is_from_peer: bool, demand_only: bool) -> None:
        object_fetch, setting = plan.object_fetch, self.world.setting
        first = plan.blocks.start
        stripe = first * setting.block // setting.stripe
        file = self.world.file_number_by_id[object_fetch.version.id]
        flight = SimulatedTransfer(plan, object_fetch, file, stripe, is_from_peer, demand_only, first)
        flying = self.steps_by_transfer[flight] = self._transfer_steps(flight)
        self._advance_transfer(flight, flying, None)

    def resume_transfer(
        self, transfer: SimulatedTransfer, wait_number: int, event: str, found: Member | None = None
    ) -> None:
        """What a flight waits for has come: 'all', 'elsewhere', 'miss', 'busy', 'error', or its turn."""
        if wait_number == transfer.wait_number and transfer in self.steps_by_transfer:
            transfer.wait_number += 1
            self._advance_transfer(transfer, self.steps_by_transfer[transfer], (event, found))

    def _advance_transfer(
        self, transfer: SimulatedTransfer, steps: TransferSteps, event: tuple[str, Member | None] | None
    ) -> None:
        try:
            if event is None:
                next(steps)
            else:
                steps.send(event)
        except StopIteration:
            self._transfer_ended(transfer)

    def _transfer_ended(self, transfer: SimulatedTransfer) -> None:
        """See Loader._done."""
        del self.steps_by_transfer[transfer]
        object_fetch = transfer.object_fetch
        self.scheduler.flight_ended(transfer.plan)
        self._idle_workers[transfer.is_from_peer][transfer.demand_only] += 1
        if transfer.remaining:
            self.scheduler.demand.queue_blocks(object_fetch, object_fetch.return_blocks(transfer.remaining))
        if object_fetch.stored.is_complete:
            self.scheduler.prefetches.drop_file(object_fetch)
            if transfer.file == self._file_being_read:
                if self._opened_at is not None:
                    self._check_open_wait(transfer.file)
                else:
                    self._read_on()
        self.assign_work()

    # -- a flight: see Exchange

    def _transfer_steps(self, transfer: SimulatedTransfer) -> TransferSteps:
        order = self.world.ranking_of(self.view_number, transfer.file, transfer.stripe)
        may_have = lambda member: self._may_have(transfer.file, member)  # noqa: E731
        members = len(self.world.member_views[self.view_number])
        for turn in policy.source_steps(
            order, self.name, transfer.failed_nodes, self.breaker.may_admit, may_have, members
        ):
            if turn.member is None:
                yield from self._read_from_origin(transfer, turn.is_owner)
                return
            if not turn.stored_only and not self.breaker.begin_trial(turn.member.name):
                transfer.failed_nodes.append(turn.member.name)
                continue
            transfer.substitutes = turn.substitutes
            yield from self._ask_node(transfer, turn.member, turn.stored_only)
            if not transfer.remaining:
                return

    def _may_have(self, file: int, member: Member) -> bool:
        since = self._not_stored_at.get((member.name, file))
        return since is None or self.world.clock.now - since > NOT_STORED_TTL

    def _ask_node(self, transfer: SimulatedTransfer, member: Member, stored_only: bool) -> TransferSteps:
        counters, clock = self.world.counters, self.world.clock
        asking = policy.RedirectState(member, member)
        while True:
            target = asking.target
            self._send_request(transfer, target, asking, stored_only)
            what, found = yield
            self._report_progress(transfer)
            self.transfers_in_progress -= 1
            self.upstream_by_stripe.pop((transfer.file, transfer.stripe), None)
            if what == "all":
                if self.world.has_faults:
                    self.breaker.request_succeeded(target.name)
                return
            if what == "busy":
                counters.refused += 1
                clock.call_at(clock.now + 1.0, self.resume_transfer, transfer, transfer.wait_number, "again")
                yield
                continue
            if what == "elsewhere":
                asking.follow_redirect(found, self.name)
                continue
            if what == "miss":
                counters.misses += 1
                self.breaker.request_undecided(target.name)
                if stored_only:
                    self._not_stored_at[target.name, transfer.file] = clock.now
            else:
                counters.errors += 1
                if not asking.is_redirected:
                    self.breaker.request_failed(target.name, what)
            if asking.is_redirected:
                asking.return_to_member()
                continue
            if not stored_only and member.name not in transfer.failed_nodes:
                transfer.failed_nodes.append(member.name)
            return

    def _send_request(
        self, transfer: SimulatedTransfer, target: Member, redirect: policy.RedirectState, stored_only: bool
    ) -> None:
        clock = self.world.clock
        self.world.counters.requests += 1
        self.transfers_in_progress += 1
        if not stored_only:
            self.upstream_by_stripe[transfer.file, transfer.stripe] = target.name
        transfer.member, transfer.stored_only, transfer.stream = target, stored_only, None
        transfer.started_at = transfer.reported_at = clock.now
        transfer.reported_block = transfer.next_block
        request = SimulatedRequest(
            self.number,
            transfer,
            transfer.wait_number,
            transfer.remaining,
            stored_only,
            transfer.plan.urgent,
            redirect.no_redirect,
            redirect.hops,
            tuple(transfer.failed_nodes),
            self.server.unsent_bytes,
            round(self.peak_throughput.bytes_per_second(clock.now) or 0),
        )
        leaves = self.server.occupy_thread(self.world.setting.asking_seconds)
        server = self.nodes[self.world.number_by_name[target.name]].server
        clock.call_at(leaves + self.world.network.latency, server.connect_client, request)

    def _read_from_origin(self, transfer: SimulatedTransfer, is_owner: bool) -> TransferSteps:
        setting, clock = self.world.setting, self.world.clock
        if not is_owner:
            self.world.counters.fallbacks += 1
        members = len(self.world.member_views[self.view_number])
        most = (
            policy.origin_request_limit(setting.concurrency, members)
            if is_owner
            else policy.fallback_request_limit(setting.fallback, members)
        )
        if self._origin_slots_used[is_owner] >= most or self._origin_queues[is_owner]:
            self._origin_queues[is_owner].append(transfer)
            yield
        else:
            self._origin_slots_used[is_owner] += 1
        transfer.member = None
        stream = SimulatedStream(
            self.world.origin_number, self.number, len(transfer.remaining), self.blocks_arrived
        )
        stream.ready_blocks = stream.block_count
        transfer.stream = stream
        self.world.counters.origin_bytes += self._bytes_of(transfer, transfer.remaining)
        self.server.transfer_by_stream[stream] = transfer
        clock.call_at(clock.now + setting.first_byte, self.world.network.queue_run, stream)
        yield
        self._origin_slots_used[is_owner] -= 1
        if self._origin_queues[is_owner]:
            self._origin_slots_used[is_owner] += 1
            following = self._origin_queues[is_owner].popleft()
            clock.call_at(clock.now, self.resume_transfer, following, following.wait_number, "turn")

    def _bytes_of(self, transfer: SimulatedTransfer, blocks: range) -> int:
        block, size = self.world.setting.block, transfer.object_fetch.version.size
        return min(blocks.stop * block, size) - min(blocks.start * block, size)

    def blocks_arrived(self, stream: SimulatedStream, count: int) -> None:
        """Further blocks of a stream are here."""
        flight = self.server.transfer_by_stream.get(stream)
        if flight is None or self.is_dead:
            return
        object_fetch, stored = flight.object_fetch, flight.object_fetch.stored
        there: bytearray = stored.there  # type: ignore[attr-defined]
        first = flight.next_block
        for block in range(first, first + count):
            if there[block]:
                self.world.counters.duplicate_bytes += stored.block_size
            else:
                there[block] = 1
                stored.missing_block_count -= 1  # type: ignore[misc]
            for waiter in object_fetch.block_arrived(block, None):
                waiter.on_settled(waiter)
        flight.next_block += count
        self.throughput.add_arrival(self.world.clock.now, count * stored.block_size)
        if stream.source != self.world.origin_number:
            self.peak_throughput.add_arrival(self.world.clock.now, count * stored.block_size)
        self.server.pass_on_blocks(flight.file, flight.stripe, object_fetch)
        if stream.arrived_blocks >= stream.block_count:
            stream.is_ended = True
            del self.server.transfer_by_stream[stream]
            if stream.source != self.world.origin_number:
                self.nodes[stream.source].server.stream_ended(stream)
            self.resume_transfer(flight, flight.wait_number, "all")

    def is_arrival_certain(self, file: int, stripe: int) -> bool:
        """Whether it is certain that a stripe comes: from its owner to us over nodes that are alive."""
        node = self
        for _ in range(2 * policy.MAX_RELAY_DEPTH):
            name = node.upstream_by_stripe.get((file, stripe))
            if name is None:
                return True
            node = self.nodes[self.world.number_by_name[name]]
            if node.is_dead:
                return False
        return False

    # -- watching each other

    def _report_progress(self, transfer: SimulatedTransfer) -> None:
        """See _Watch.tell."""
        now = self.world.clock.now
        if self.world.has_faults and transfer.member is not None and now > transfer.reported_at:
            nbytes = self._bytes_of(transfer, range(transfer.reported_block, transfer.next_block))
            self.speeds.record_transfer(
                transfer.member.name, nbytes, now - transfer.reported_at, stored=transfer.all_stored
            )
            transfer.reported_block, transfer.reported_at = transfer.next_block, now

    def poll_transfers(self) -> None:
        """See _Watch.glance: once a second, for all flights."""
        if self.is_dead or self.done_at is not None:
            return
        now = self.world.clock.now
        self.world.clock.call_at(now + POLL_EVERY, self.poll_transfers)
        idle = self.transfers_in_progress < self.world.setting.peer_workers // 8
        looks = HEDGES_PER_POLL
        for flight in list(self.steps_by_transfer):
            member = flight.member
            if member is None or flight.stored_only or now - flight.started_at < POLL_EVERY:
                continue
            self._report_progress(flight)
            slow = self.speeds.is_slow(member.name)
            if (slow or idle) and looks:
                looks -= 1
                others = [
                    other
                    for other in self.world.member_views[self.view_number]
                    if other.name not in (self.name, member.name, *flight.failed_nodes)
                ]
                asked = self.world.rng.sample(others, min(len(others), RANDOM_CANDIDATES))
                if self._hedge_transfer(flight, asked, stored_only=True):
                    continue
            loaded = self.server.receiver_rates.has_normal_link(member.name)
            if slow and now - flight.started_at > (SUBSTITUTE_LOADED_AFTER if loaded else SUBSTITUTE_AFTER):
                self._hedge_transfer(
                    flight, [other for other in flight.substitutes if other is not member], stored_only=False
                )

    def _hedge_transfer(
        self, transfer: SimulatedTransfer, asked: Sequence[Member], *, stored_only: bool
    ) -> bool:
        """See PeerBlockSource.hedge_transfer. The answers are not waited for one by one: who has it begins
        after a round trip."""
        failed = (
            transfer.failed_nodes
            if stored_only
            else [*transfer.failed_nodes, transfer.member.name if transfer.member else ""]
        )
        for member in asked:
            if not self.breaker.begin_trial(member.name):
                continue
            server = self.nodes[self.world.number_by_name[member.name]].server
            server.occupy_thread(self.world.setting.answering_seconds)
            transfer.wait_number += (
                1  # the first request is not listened to any more, if this one is answered
            )
            request = SimulatedRequest(
                self.number,
                transfer,
                transfer.wait_number,
                transfer.remaining,
                stored_only,
                transfer.plan.urgent,
                True,
                0,
                tuple(failed),
                self.server.unsent_bytes,
                round(self.peak_throughput.bytes_per_second(self.world.clock.now) or 0),
            )
            if server.would_accept(request):
                self.world.counters.hedges += 1
                self._abandon_stream(transfer)
                if not stored_only and transfer.member is not None:
                    self.breaker.avoid_slow_node(transfer.member.name)
                transfer.member, transfer.stored_only = member, True
                transfer.started_at = self.world.clock.now
                server.start_sending(request)
                return True
            transfer.wait_number -= 1
            self.breaker.request_undecided(member.name)
        return False

    def _abandon_stream(self, transfer: SimulatedTransfer) -> None:
        """Take no more from whoever sends."""
        stream = transfer.stream
        if stream is not None:
            stream.is_ended = True
            self.server.transfer_by_stream.pop(stream, None)
            if stream.source != self.world.origin_number:
                self.nodes[stream.source].server.stream_ended(stream)
            transfer.stream = None

    def lose_transfer(self, transfer: SimulatedTransfer) -> None:
        """Whoever sends has broken off, or is given up."""
        if transfer in self.steps_by_transfer:
            self._abandon_stream(transfer)
            self.resume_transfer(transfer, transfer.wait_number, "error")

    # -- deaths

    def lose_power(self) -> None:
        """The power fails."""
        self.is_dead = True
        for flight in list(self.steps_by_transfer):
            self._abandon_stream(flight)
        self.steps_by_transfer.clear()
        self.server.lose_power()

    def notice_deaths(self, view_number: int) -> None:
        """Other nodes are known to be dead: see Cluster.run."""
        if self.is_dead:
            return
        self.view_number = view_number
        for object_fetch in self.fetch_by_file.values():
            self._set_route(object_fetch)
            self.scheduler.demand.queue_blocks(object_fetch, list(object_fetch.waiters.by_block))
        for flight in list(self.steps_by_transfer):
            member = flight.member
            if member is not None and self.nodes[self.world.number_by_name[member.name]].is_dead:
                self.lose_transfer(flight)
        self.assign_work()
