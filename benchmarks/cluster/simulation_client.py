"""The receiving side of a simulated node: performs the actions of its flights' StripeRequests over the simulated
network, as TransferDriver does over sockets."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from benchmarks.cluster.simulation_network import SimulatedStream
from benchmarks.cluster.simulation_peer import (
    PeerEvent,
    SimulatedPeer,
    SimulatedRequest,
    SimulatedTransfer,
)
from benchmarks.cluster.simulation_server import SimulatedServer
from fusecache.fetch.object_fetch import FlightPlan
from fusecache.peers.exchange import policy
from fusecache.peers.exchange.breaker import CircuitBreaker, SpeedComparison
from fusecache.peers.exchange.hedger import Hedger
from fusecache.peers.exchange.misses import MissTable
from fusecache.peers.exchange.stripe_request import (
    Abandon,
    Action,
    Ask,
    Done,
    Hedge,
    PeerKnowledge,
    ReadOrigin,
    State,
    StripeRequest,
    Wait,
)
from fusecache.peers.member import Member
from fusecache.throughput import PeakThroughput


class SimulatedClient:
    """The flights of one node. `servers` are the sending sides of all nodes.

    | A transfer | Event | Next |
    |---|---|---|
    | waits for a node (`sender`) | a PeerEvent | the action of its StripeRequest |
    | waits for a busy node's time | it is over | the same |
    | waits for its turn at the origin | another one is through | reads from it |
    | reads from the origin | the last block arrives | has ended |

    Flights have no deadline here, and a node that waits says so in time: it is never silent.
    """

    def __init__(
        self,
        peer: SimulatedPeer,
        server: SimulatedServer,
        servers: Sequence[SimulatedServer],
        *,
        on_blocks: Callable[[SimulatedTransfer, range], None],
        on_ended: Callable[[SimulatedTransfer], None],
    ) -> None:
        """`on_blocks` is called when these blocks of a transfer have arrived, `on_ended` when it is over."""
        self.name = peer.name
        self.number = peer.number
        self._peer = peer
        self._world = peer.world
        self._server = server
        self._servers = servers
        self._on_blocks = on_blocks
        self._on_ended = on_ended
        clock, workers = self._now, peer.world.setting.peer_workers
        self._speeds = SpeedComparison(clock)
        hedger = Hedger(
            peer.name,
            lambda: peer.members,
            self._speeds,
            server.receiver_rates,
            lambda: policy.is_mostly_idle(self._transfers_in_progress, workers),
            clock=clock,
            sample=peer.world.rng.sample,
        )
        self._knowledge = PeerKnowledge(
            peer.name, CircuitBreaker(clock, peer.world.rng.uniform), hedger, MissTable(clock), clock
        )
        self._transfers: dict[SimulatedTransfer, None] = {}
        self._transfer_by_stream: dict[SimulatedStream, SimulatedTransfer] = {}
        self._transfers_in_progress = 0
        self._peak_throughput = PeakThroughput()
        self._origin_slots_used = [0, 0]
        self._origin_queues: list[deque[SimulatedTransfer]] = [deque(), deque()]
        """For requests to the origin: of others' stripes, of our own."""

    def _now(self) -> float:
        return self._world.clock.now

    def max_prefetch_flights(self) -> int:
        """How many flights from other nodes may be under way for blocks that no reader waits for."""
        return self._server.receiver_rates.max_prefetch_flights(
            self._peak_throughput.bytes_per_second(self._now()), self._world.setting.peer_workers
        )

    def start_transfer(self, plan: FlightPlan, *, is_from_peer: bool, demand_only: bool) -> None:
        """A thread begins a flight."""
        setting = self._world.setting
        first, version = plan.blocks.start, plan.object_fetch.version
        file, stripe = self._world.file_number_by_id[version.id], first * setting.block // setting.stripe
        request = StripeRequest(
            self._knowledge,
            version.id,
            self._peer.ranking_of(file, stripe),
            len(self._peer.members),
            deadline=math.inf,
            cancelled=lambda: False,
        )
        transfer = SimulatedTransfer(plan, file, stripe, is_from_peer, demand_only, request, first)
        self._transfers[transfer] = None
        self._perform(transfer, request.start())

    def _perform(self, transfer: SimulatedTransfer, action: Action) -> None:
        match action:
            case Ask():
                self._send_request(transfer, action)
            case Wait(seconds):
                clock = self._world.clock
                clock.call_at(clock.now + seconds, self._waited, transfer)
            case ReadOrigin(is_owner):
                self._queue_for_origin(transfer, is_owner)
            case Done():
                self._end(transfer)
            case _:
                raise AssertionError(f"{action} outside of a poll")

    def _waited(self, transfer: SimulatedTransfer) -> None:
        if transfer in self._transfers:
            self._perform(transfer, transfer.request.waited())

    def _end(self, transfer: SimulatedTransfer) -> None:
        del self._transfers[transfer]
        self._on_ended(transfer)

    # -- other nodes

    def _send_request(self, transfer: SimulatedTransfer, ask: Ask) -> None:
        self._world.counters.requests += 1
        self._transfers_in_progress += 1
        self._wait_for(transfer, ask)
        transfer.stream = None
        leaves = self._server.occupy_thread(self._world.setting.asking_seconds)
        self._world.clock.call_at(
            leaves + self._world.network.latency,
            self._server_of(ask.member).connect_client,
            self._make_request(transfer, ask),
        )

    def _wait_for(self, transfer: SimulatedTransfer, ask: Ask) -> None:
        """The node that is asked is the one to wait for."""
        transfer.awaiting.close()
        if not ask.stored_only:
            stripe = self._peer.stripe_id(transfer.file, transfer.stripe)
            transfer.awaiting.enter_context(self._peer.dependencies.awaiting(stripe, ask.member.name))
        transfer.sender, transfer.stored_only = ask.member, ask.stored_only
        transfer.reported_at, transfer.reported_block = self._now(), transfer.next_block

    def _server_of(self, member: Member) -> SimulatedServer:
        return self._servers[self._world.number_by_name[member.name]]

    def _make_request(self, transfer: SimulatedTransfer, ask: Ask) -> SimulatedRequest:
        return SimulatedRequest(
            self,
            transfer,
            transfer.wait_number,
            ask,
            transfer.remaining,
            transfer.plan.urgent,
            self._server.unsent_bytes,
            round(self._peak_throughput.bytes_per_second(self._now()) or 0),
        )

    def deliver(
        self, transfer: SimulatedTransfer, wait_number: int, event: PeerEvent, target: Member | None = None
    ) -> None:
        """Report to the transfer's StripeRequest what came of a request, unless it was abandoned."""
        sender = transfer.sender
        if wait_number != transfer.wait_number or transfer not in self._transfers or sender is None:
            return
        transfer.wait_number += 1
        self._report_progress(transfer)
        self._transfers_in_progress -= 1
        transfer.awaiting.close()
        transfer.sender = None
        self._perform(transfer, self._report_event(transfer, sender, event, target))

    def _report_event(
        self, transfer: SimulatedTransfer, sender: Member, event: PeerEvent, target: Member | None
    ) -> Action:
        counters, request = self._world.counters, transfer.request
        match event:
            case PeerEvent.COMPLETED:
                return request.completed()
            case PeerEvent.BUSY:
                counters.refused += 1
                return request.busy(policy.RETRY_AFTER)
            case PeerEvent.REDIRECTED:
                return request.redirected(target)
            case PeerEvent.MISSED:
                counters.misses += 1
                return request.missed()
            case PeerEvent.CONNECT_TIMED_OUT:
                counters.errors += 1
                is_alive = sender.name in self._peer.live_names
                return request.connect_timed_out("no connection", is_alive=is_alive)
            case PeerEvent.BROKE_OFF:
                counters.errors += 1
                return request.failed("broke off")

    def stream_began(self, transfer: SimulatedTransfer, stream: SimulatedStream, *, all_stored: bool) -> None:
        """The node that is waited for begins to send."""
        transfer.stream, transfer.all_stored = stream, all_stored
        self._transfer_by_stream[stream] = transfer
        if transfer.request.state is State.ASKING:
            transfer.request.answered()

    # -- the origin

    def _queue_for_origin(self, transfer: SimulatedTransfer, is_owner: bool) -> None:
        setting = self._world.setting
        if not is_owner:
            self._world.counters.fallbacks += 1
        members = len(self._peer.members)
        most = (
            policy.origin_request_limit(setting.concurrency, members)
            if is_owner
            else policy.fallback_request_limit(setting.fallback, members)
        )
        transfer.reads_as_owner = is_owner
        if self._origin_slots_used[is_owner] >= most or self._origin_queues[is_owner]:
            self._origin_queues[is_owner].append(transfer)
        else:
            self._origin_slots_used[is_owner] += 1
            self._read_from_origin(transfer)

    def _read_from_origin(self, transfer: SimulatedTransfer) -> None:
        if transfer not in self._transfers:
            return
        world = self._world
        stream = SimulatedStream(
            world.origin_number, self.number, len(transfer.remaining), self.blocks_arrived
        )
        stream.ready_blocks = stream.block_count
        transfer.stream = stream
        self._transfer_by_stream[stream] = transfer
        world.counters.origin_bytes += self._bytes_of(transfer, transfer.remaining)
        world.clock.call_at(world.clock.now + world.setting.first_byte, world.network.queue_run, stream)

    def _origin_read_ended(self, transfer: SimulatedTransfer) -> None:
        is_owner = transfer.reads_as_owner
        self._origin_slots_used[is_owner] -= 1
        if self._origin_queues[is_owner]:
            self._origin_slots_used[is_owner] += 1
            clock = self._world.clock
            clock.call_at(clock.now, self._read_from_origin, self._origin_queues[is_owner].popleft())
        self._end(transfer)

    # -- blocks

    def _bytes_of(self, transfer: SimulatedTransfer, blocks: range) -> int:
        block, size = self._world.setting.block, transfer.object_fetch.version.size
        return min(blocks.stop * block, size) - min(blocks.start * block, size)

    def blocks_arrived(self, stream: SimulatedStream, count: int) -> None:
        """Take the next blocks of a stream, and pass them on to the nodes that wait for them."""
        transfer = self._transfer_by_stream.get(stream)
        if transfer is None or self._peer.is_dead:
            return
        first = transfer.next_block
        transfer.next_block += count
        is_from_origin = stream.source == self._world.origin_number
        if not is_from_origin:
            self._peak_throughput.add_arrival(self._now(), count * self._world.setting.block)
        self._on_blocks(transfer, range(first, first + count))
        self._server.pass_on_blocks(transfer.file, transfer.stripe)
        if stream.arrived_blocks < stream.block_count:
            return
        stream.is_ended = True
        del self._transfer_by_stream[stream]
        if is_from_origin:
            self._origin_read_ended(transfer)
        else:
            self._servers[stream.source].stream_ended(stream)
            self.deliver(transfer, transfer.wait_number, PeerEvent.COMPLETED)

    # -- watching each other

    def _report_progress(self, transfer: SimulatedTransfer) -> None:
        """Count how fast the sender was since the last report; only where nodes have to watch each other."""
        now = self._now()
        if self._world.has_faults and transfer.sender is not None and now > transfer.reported_at:
            nbytes = self._bytes_of(transfer, range(transfer.reported_block, transfer.next_block))
            self._speeds.record_transfer(
                transfer.sender.name, nbytes, now - transfer.reported_at, stored=transfer.all_stored
            )
            transfer.reported_block, transfer.reported_at = transfer.next_block, now

    def poll_transfers(self) -> None:
        """Poll all flights, as often as all flights together may search for another holder."""
        if self._peer.is_dead:
            return
        clock = self._world.clock
        clock.call_at(clock.now + policy.STORED_HEDGE_EVERY, self.poll_transfers)
        for transfer in list(self._transfers):
            sender = transfer.sender
            if sender is None or transfer not in self._transfers:
                continue
            self._report_progress(transfer)
            action = transfer.request.polled(0.0, is_alive=sender.name in self._peer.live_names)
            while isinstance(action, Hedge):
                action = self._perform_hedge(transfer, action.ask)
            if isinstance(action, Abandon):
                self.lose_transfer(transfer)

    def _perform_hedge(self, transfer: SimulatedTransfer, ask: Ask) -> Action:
        """Ask another node, too. Its answer is not waited for: a node that would begin to send begins at once."""
        server = self._server_of(ask.member)
        server.occupy_thread(self._world.setting.answering_seconds)
        transfer.wait_number += (
            1  # what comes of the first request is not listened to, if this one is answered
        )
        request = self._make_request(transfer, ask)
        if not server.would_accept(request):
            transfer.wait_number -= 1
            return transfer.request.hedge_failed()
        self._world.counters.hedges += 1
        self._abandon_stream(transfer)
        action = transfer.request.hedge_answered()
        self._wait_for(transfer, ask)
        server.start_sending(request)
        return action

    def _abandon_stream(self, transfer: SimulatedTransfer) -> None:
        """Take no more from the node that sends."""
        stream = transfer.stream
        if stream is not None:
            stream.is_ended = True
            self._transfer_by_stream.pop(stream, None)
            if stream.source != self._world.origin_number:
                self._servers[stream.source].stream_ended(stream)
            transfer.stream = None

    def lose_transfer(self, transfer: SimulatedTransfer) -> None:
        """The node that sends has broken off, or is given up."""
        if transfer in self._transfers:
            self._abandon_stream(transfer)
            self.deliver(transfer, transfer.wait_number, PeerEvent.BROKE_OFF)

    def lose_power(self) -> None:
        """The power fails: nothing arrives any more."""
        for transfer in self._transfers:
            self._abandon_stream(transfer)
        self._transfers.clear()
