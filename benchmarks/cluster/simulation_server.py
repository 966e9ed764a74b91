"""The sending side of a simulated node: what PeerServer and BlockService do with connections, threads and streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from benchmarks.cluster.simulation_connections import SimulatedConnections
from benchmarks.cluster.simulation_network import SimulatedStream
from benchmarks.cluster.simulation_peer import PeerEvent, SimulatedPeer, SimulatedRequest
from fusecache.peers.exchange import policy
from fusecache.peers.member import Member


class SimulatedServer:
    """Answers the requests of other nodes.

    | A request | Event | Next |
    |---|---|---|
    | reaches the node | a connection is free | waits for the node's thread |
    | | none is, and the backlog has room | waits for a connection |
    | | none is, and the backlog is full, or the node is dead | times out |
    | has the node's thread | the node may not serve it, or another holder is to | is answered: MISSED, REDIRECTED |
    | | a stream is free | is sent |
    | | none is | waits for a stream, for policy.MAX_QUEUED at most: BUSY |
    | is sent | all blocks have arrived, or its client abandons it | has ended |
    | | a block is missing, and it is not certain that it comes | breaks off |
    """

    def __init__(
        self, peer: SimulatedPeer, peers: Sequence[SimulatedPeer], on_demand: Callable[[int, int, bool], None]
    ) -> None:
        """`peers` are all nodes; `on_demand` gets a file's number, a block that a caller waits for and nobody fetches,
        and whether a reader waits for it."""
        self.receiver_rates = policy.ReceiverRates()
        self._peer = peer
        self._peers = peers
        self._on_demand = on_demand
        self._world = peer.world
        self._busy_until = 0.0
        self._relay_trees = policy.RelayTrees(peer.name)
        self._connections = SimulatedConnections(self._world, self._accept_request, self._time_out)
        self._waiting_count = 0
        self._streams_used = 0
        self._promised_bytes = 0
        self._stream_queue: deque[SimulatedRequest] = deque()
        self._request_by_stream: dict[SimulatedStream, SimulatedRequest] = {}
        self._starved_streams: dict[tuple[int, int], list[SimulatedStream]] = {}
        """Streams that wait for blocks of a stripe."""

    def occupy_thread(self, seconds: float) -> float:
        """Have the node's one running thread do something that takes so many seconds; returns when it will be done."""
        now = self._world.clock.now
        self._busy_until = max(now, self._busy_until) + seconds
        return self._busy_until

    @property
    def unsent_bytes(self) -> int:
        """Bytes promised to others, and not there yet."""
        block = self._world.setting.block
        return self._promised_bytes - block * sum(stream.arrived_blocks for stream in self._request_by_stream)

    # -- connections

    def connect_client(self, request: SimulatedRequest) -> None:
        """A request reaches this node."""
        if self._peer.is_dead:
            self._time_out(request)
        else:
            self._connections.connect(request)

    def _time_out(self, request: SimulatedRequest) -> None:
        """No connection comes about."""
        clock, event = self._world.clock, PeerEvent.CONNECT_TIMED_OUT
        clock.call_at(
            clock.now + self._world.setting.timeout,
            request.client.deliver,
            request.transfer,
            request.wait_number,
            event,
        )

    def _accept_request(self, request: SimulatedRequest) -> None:
        counters, clock = self._world.counters, self._world.clock
        waits = max(0.0, self._busy_until - clock.now)
        counters.waited_seconds += waits
        number = self._peer.number
        counters.longest_waits[number] = max(counters.longest_waits[number], waits)
        self._waiting_count += 1
        counters.most_queued = max(counters.most_queued, self._waiting_count)
        clock.call_at(
            self.occupy_thread(self._world.setting.redirecting_seconds), self._handle_request, request
        )

    # -- what becomes of a request

    def _answer_request(
        self, request: SimulatedRequest, event: PeerEvent, target: Member | None = None
    ) -> None:
        clock = self._world.clock
        self._connections.release(request.client.number)
        clock.call_at(
            clock.now + self._world.network.latency,
            request.client.deliver,
            request.transfer,
            request.wait_number,
            event,
            target,
        )

    def _may_serve(self, request: SimulatedRequest) -> bool:
        """Whether this node sends these blocks: it has them, or gets them."""
        peer, ask, transfer = self._peer, request.ask, request.transfer
        if peer.stored_of(transfer.file).first_missing(request.blocks) is None:
            return True
        upstream = peer.dependencies.upstream_nodes(peer.stripe_id(transfer.file, transfer.stripe))
        idle = peer.fetch_of(transfer.file).idle
        return policy.may_serve(
            peer.ranking_of(transfer.file, transfer.stripe),
            peer.name,
            len(peer.members),
            failed_nodes=ask.failed_nodes,
            hops=ask.hops,
            stored_only=ask.stored_only,
            comes_from_caller=request.client.name in upstream,
            is_coming=lambda: idle.find(1, request.blocks.start, request.blocks.stop) < 0,
        )

    def _choose_sender(self, request: SimulatedRequest) -> str:
        """The node that is to send these blocks: this one, or another holder."""
        peer, ask = self._peer, request.ask
        self.receiver_rates.record_rate(request.client.name, request.receive_rate)
        return self._relay_trees.choose_sender(
            peer.stripe_id(request.transfer.file, request.transfer.stripe),
            request.client.name,
            peer.live_names,
            len(request.blocks) * self._world.setting.block,
            failed_nodes=ask.failed_nodes,
            caller_unsent=request.unsent_bytes,
            own_unsent=self.unsent_bytes,
            no_redirect=ask.no_redirect,
            hops=ask.hops,
        )

    def _handle_request(self, request: SimulatedRequest) -> None:
        self._waiting_count -= 1
        if self._peer.is_dead:
            self._time_out(request)
            return
        if request.is_abandoned:
            self._connections.release(request.client.number)  # the client has found another node
            return
        if not self._may_serve(request):
            self._answer_request(request, PeerEvent.MISSED)
            return
        if not request.ask.stored_only:
            sender = self._choose_sender(request)
            if sender != self._peer.name:
                self._world.counters.redirects += 1
                number = self._world.number_by_name[sender]
                self._answer_request(request, PeerEvent.REDIRECTED, self._world.member_views[0][number])
                return
        if self._streams_used < self._world.setting.streams:
            self.start_sending(request)
        else:
            self._stream_queue.append(request)
            clock = self._world.clock
            clock.call_at(clock.now + policy.MAX_QUEUED, self._refuse_request, request)

    def _refuse_request(self, request: SimulatedRequest) -> None:
        if request in self._stream_queue:
            self._stream_queue.remove(request)
            self._answer_request(request, PeerEvent.BUSY)

    def would_accept(self, request: SimulatedRequest) -> bool:
        """Whether it is not turned down at once."""
        return (
            not self._peer.is_dead
            and self._may_serve(request)
            and self._streams_used < self._world.setting.streams
        )

    def start_sending(self, request: SimulatedRequest) -> None:
        """Begin to send, unless the client has abandoned the request."""
        client, transfer = request.client, request.transfer
        if request.is_abandoned:
            self._connections.release(client.number)
            return
        self._streams_used += 1
        setting = self._world.setting
        self.occupy_thread(setting.answering_seconds - setting.redirecting_seconds)
        stream = SimulatedStream(self._peer.number, client.number, len(request.blocks), client.blocks_arrived)
        self._promised_bytes += len(request.blocks) * setting.block
        self._request_by_stream[stream] = request
        stored = self._peer.stored_of(transfer.file)
        client.stream_began(transfer, stream, all_stored=stored.first_missing(request.blocks) is None)
        self._refill_stream(stream)

    def _refill_stream(self, stream: SimulatedStream) -> None:
        """Send what is there, and have the first block fetched that is not."""
        request = self._request_by_stream[stream]
        blocks, transfer = request.blocks, request.transfer
        stored = self._peer.stored_of(transfer.file)
        missing = stored.first_missing(range(blocks.start + stream.ready_blocks, blocks.stop))
        stream.ready_blocks = (blocks.stop if missing is None else missing) - blocks.start
        if missing is not None:
            self._starved_streams.setdefault((transfer.file, transfer.stripe), []).append(stream)
            if self._peer.fetch_of(transfer.file).idle[missing]:
                self._on_demand(transfer.file, missing, request.is_urgent)
            if self._world.has_faults:
                self._check_certainty_later(stream)
        self._world.network.queue_run(stream)

    def _check_certainty_later(self, stream: SimulatedStream) -> None:
        clock = self._world.clock
        clock.call_at(clock.now + policy.MAX_UNCERTAIN, self._check_certainty, stream, stream.ready_blocks)

    def _check_certainty(self, stream: SimulatedStream, ready_blocks: int) -> None:
        """Break off if no block has come since, and it is not certain that the next one does."""
        request = self._request_by_stream.get(stream)
        if request is None or stream.ready_blocks > ready_blocks:
            return
        if self._is_arrival_certain(request):
            self._check_certainty_later(stream)
        else:
            request.client.lose_transfer(request.transfer)

    def _is_arrival_certain(self, request: SimulatedRequest) -> bool:
        """Whether a stripe comes to this node from its owner, over nodes that are alive."""
        peer = self._peer
        stripe = peer.stripe_id(request.transfer.file, request.transfer.stripe)
        for _ in range(2 * policy.MAX_RELAY_DEPTH):
            upstream = peer.dependencies.upstream_nodes(stripe)
            if not upstream:
                return True
            peer = self._peers[self._world.number_by_name[next(iter(upstream))]]
            if peer.is_dead:
                return False
        return False

    def pass_on_blocks(self, file: int, stripe: int) -> None:
        """Blocks of this stripe have arrived here."""
        for stream in self._starved_streams.pop((file, stripe), ()):
            if not stream.is_ended:
                self._refill_stream(stream)

    def stream_ended(self, stream: SimulatedStream) -> None:
        """All of it has arrived, or its client abandons it."""
        request = self._request_by_stream.pop(stream, None)
        if request is None:
            return
        stream.is_ended = True
        self._promised_bytes -= len(request.blocks) * self._world.setting.block
        self._streams_used -= 1
        self._connections.release(request.client.number)
        if self._stream_queue:
            self.start_sending(self._stream_queue.popleft())

    def lose_power(self) -> None:
        """The power fails: the clients notice that later, by themselves."""
        for stream in self._request_by_stream:
            stream.is_ended = True
        self._request_by_stream.clear()
        self._starved_streams.clear()
        self._stream_queue.clear()
        self._connections.lose_power()
