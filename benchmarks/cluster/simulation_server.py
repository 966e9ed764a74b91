"""The giving side of a simulated node: see Holdings and PeerServer."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.cluster.simulation_network import SimulatedStream
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.waiter import Waiter
from fusecache.peers.exchange import policy

if TYPE_CHECKING:
    from benchmarks.cluster.simulation_node import SimulatedNode, SimulatedTransfer

BACKLOG = 1024
MAX_UNCERTAIN = 5.0
MAX_QUEUED = 20.0
"""As in server.py and holdings.py."""


@dataclass(eq=False, slots=True)
class SimulatedRequest:
    """See BlockRequest."""

    client_number: int
    transfer: SimulatedTransfer
    wait_number: int
    blocks: range
    stored_only: bool
    is_urgent: bool
    no_redirect: bool
    hops: int
    failed_nodes: tuple[str, ...]
    unsent_bytes: int
    receive_rate: int


class SimulatedServer:
    """Of one node."""

    def __init__(self, node: SimulatedNode) -> None:
        self.transfer_by_stream: dict[SimulatedStream, SimulatedTransfer] = {}
        """What comes to this node."""
        self._node = node
        self._world = node.world
        self._busy_until = 0.0
        self._relay_trees = policy.RelayTrees(node.name)
        self._connection_count = 0
        self._idle_since: OrderedDict[tuple[int, int], float] = OrderedDict()
        """(client, a number) -> since when, of kept connections."""
        self._idle_by_client: dict[int, list[int]] = {}
        self._connections_kept = 0
        self._backlog: deque[SimulatedRequest] = deque()
        self._waiting_count = 0
        self.receiver_rates = policy.ReceiverRates()
        self._streams_used = 0
        self._promised_bytes = 0
        self._stream_queue: deque[SimulatedRequest] = deque()
        self._request_by_stream: dict[SimulatedStream, SimulatedRequest] = {}
        self._starved_streams: dict[tuple[int, int], list[SimulatedStream]] = {}
        """Streams that wait for blocks of a stripe."""

    def occupy_thread(self, seconds: float) -> float:
        """Have the node's one running thread do something that takes so long; returns when it is done."""
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
        """A request reaches this node, over a kept connection if there is one."""
        if self._node.is_dead:
            self._fail_request(request, self._world.setting.timeout)
            return
        kept = self._idle_by_client.get(request.client_number)
        if kept:
            del self._idle_since[request.client_number, kept.pop()]
            self._accept_request(request)
            return
        clock = self._world.clock
        if self._connection_count >= self._world.setting.connections and self._idle_since:
            self._close_connection(next(iter(self._idle_since)))
        if self._connection_count < self._world.setting.connections:
            self._connection_count += 1
            self._world.counters.most_connections = max(
                self._world.counters.most_connections, self._connection_count
            )
            # the round trip of the handshake
            clock.call_at(clock.now + 2 * self._world.network.latency, self._accept_request, request)
        elif len(self._backlog) < BACKLOG:
            self._backlog.append(request)
        else:
            self._world.counters.not_connected += 1
            self._fail_request(request, self._world.setting.timeout)

    def _close_connection(self, key: tuple[int, int]) -> None:
        del self._idle_since[key]
        self._idle_by_client[key[0]].remove(key[1])
        self._connection_count -= 1

    def _release_connection(self, client: int) -> None:
        """A request was answered: its connection is kept, or closed for who waits for one."""
        if self._backlog:
            self._accept_request(self._backlog.popleft())
            return
        self._connections_kept += 1
        self._idle_since[client, self._connections_kept] = self._world.clock.now
        self._idle_by_client.setdefault(client, []).append(self._connections_kept)

    def _fail_request(self, request: SimulatedRequest, seconds: float) -> None:
        clock = self._world.clock
        client = self._node.nodes[request.client_number]
        clock.call_at(
            clock.now + seconds, client.resume_transfer, request.transfer, request.wait_number, "error"
        )

    def _accept_request(self, request: SimulatedRequest) -> None:
        counters, clock = self._world.counters, self._world.clock
        waits = max(0.0, self._busy_until - clock.now)
        counters.waited_seconds += waits
        number = self._node.number
        counters.longest_waits[number] = max(counters.longest_waits[number], waits)
        self._waiting_count += 1
        counters.most_queued = max(counters.most_queued, self._waiting_count)
        clock.call_at(
            self.occupy_thread(self._world.setting.redirecting_seconds), self._handle_request, request
        )

    # -- what becomes of a request

    def _answer_request(self, request: SimulatedRequest, event: str, found: object = None) -> None:
        clock = self._world.clock
        client = self._node.nodes[request.client_number]
        self._release_connection(request.client_number)
        clock.call_at(
            clock.now + self._world.network.latency,
            client.resume_transfer,
            request.transfer,
            request.wait_number,
            event,
            found,
        )

    def _is_withheld(self, request: SimulatedRequest) -> bool:
        """See BlockService._prepare_response."""
        node, flight = self._node, request.transfer
        object_fetch = node.fetch_of(flight.file)
        if object_fetch.stored.has(request.blocks):  # type: ignore[attr-defined]
            return False
        if request.stored_only:
            return True
        if (
            node.upstream_by_stripe.get((flight.file, flight.stripe))
            == node.nodes[request.client_number].name
        ):
            return True
        order = self._world.ranking_of(node.view_number, flight.file, flight.stripe)
        members = len(self._world.member_views[node.view_number])
        if policy.should_fetch(order, node.name, request.failed_nodes, request.hops, members):
            return False
        return object_fetch.idle.find(1, request.blocks.start, request.blocks.stop) >= 0

    def _handle_request(self, request: SimulatedRequest) -> None:
        self._waiting_count -= 1
        node, flight = self._node, request.transfer
        if node.is_dead:
            self._fail_request(request, self._world.setting.timeout)
            return
        if flight.wait_number != request.wait_number:
            self._release_connection(request.client_number)  # who asked has found another
            return
        if self._is_withheld(request):
            self._answer_request(request, "miss")
            return
        if not request.stored_only:
            asking = node.nodes[request.client_number].name
            stripe = (flight.object_fetch.version.id, flight.stripe)
            self._relay_trees.record_unsent(asking, request.unsent_bytes)
            self.receiver_rates.record_rate(asking, request.receive_rate)
            self._relay_trees.record_unsent(node.name, self.unsent_bytes)
            usable = policy.Excluding(
                self._world.live_names(node.view_number), (asking, *request.failed_nodes)
            )
            direct = request.no_redirect or request.hops > 0
            nbytes = len(request.blocks) * self._world.setting.block
            found = self._relay_trees.assign_parent(stripe, asking, usable, nbytes, no_redirect=direct)
            if found != node.name:
                self._world.counters.redirects += 1
                self._answer_request(
                    request, "elsewhere", self._world.member_views[0][self._world.number_by_name[found]]
                )
                return
        if self._streams_used < self._world.setting.streams:
            self.start_sending(request)
        else:
            self._stream_queue.append(request)
            clock = self._world.clock
            clock.call_at(clock.now + MAX_QUEUED, self._refuse_request, request)

    def _refuse_request(self, request: SimulatedRequest) -> None:
        if request in self._stream_queue:
            self._stream_queue.remove(request)
            self._answer_request(request, "busy")

    def would_accept(self, request: SimulatedRequest) -> bool:
        """Whether it is not turned down at once."""
        return (
            not self._node.is_dead
            and not self._is_withheld(request)
            and self._streams_used < self._world.setting.streams
        )

    def start_sending(self, request: SimulatedRequest) -> None:
        """Begin to send."""
        if request.transfer.wait_number != request.wait_number:
            self._release_connection(request.client_number)
            return
        self._streams_used += 1
        setting = self._world.setting
        self.occupy_thread(setting.answering_seconds - setting.redirecting_seconds)
        node, client = self._node, self._node.nodes[request.client_number]
        flight = request.transfer
        object_fetch = node.fetch_of(flight.file)
        stream = SimulatedStream(
            node.number, request.client_number, len(request.blocks), client.blocks_arrived
        )
        self._promised_bytes += len(request.blocks) * setting.block
        self._request_by_stream[stream] = request
        flight.stream = stream
        flight.all_stored = object_fetch.stored.has(request.blocks)  # type: ignore[attr-defined]
        client.server.transfer_by_stream[stream] = flight
        self._refill_stream(stream, object_fetch)

    def _refill_stream(self, stream: SimulatedStream, object_fetch: ObjectFetch) -> None:
        request = self._request_by_stream[stream]
        there: bytearray = object_fetch.stored.there  # type: ignore[attr-defined]
        stop = there.find(0, request.blocks.start + stream.ready_blocks, request.blocks.stop)
        stream.ready_blocks = (stop if stop >= 0 else request.blocks.stop) - request.blocks.start
        if stop >= 0:
            key = request.transfer.file, request.transfer.stripe
            self._starved_streams.setdefault(key, []).append(stream)
            if object_fetch.idle[stop]:
                self._request_block(object_fetch, stop, request.is_urgent)
            if self._world.has_faults:
                clock = self._world.clock
                clock.call_at(clock.now + MAX_UNCERTAIN, self._check_certainty, stream, stream.ready_blocks)
        self._world.network.queue_run(stream)

    def _check_certainty(self, stream: SimulatedStream, ready_blocks: int) -> None:
        """See _StoredBlockResponse._certainty_age: we wait as long as it is certain that it comes."""
        request = self._request_by_stream.get(stream)
        if request is None or stream.ready_blocks > ready_blocks:
            return
        if self._node.is_arrival_certain(request.transfer.file, request.transfer.stripe):
            clock = self._world.clock
            clock.call_at(clock.now + MAX_UNCERTAIN, self._check_certainty, stream, ready_blocks)
            return
        self._node.nodes[request.client_number].lose_transfer(request.transfer)

    def _request_block(self, object_fetch: ObjectFetch, block: int, is_urgent: bool) -> None:
        """See FetchService.request_bytes."""
        size = object_fetch.stored.block_size
        now = self._world.clock.now
        waiter = Waiter(
            object_fetch.version.key,
            block * size,
            size,
            missing_blocks=[block],
            waiting_since=now,
            deadline=now + 60.0,
            on_settled=lambda _waiter: None,
            urgent=is_urgent,
        )
        object_fetch.waiters.add(waiter)
        self._node.scheduler.demand.queue_blocks(object_fetch, [block])
        self._node.assign_work()

    def pass_on_blocks(self, file: int, stripe: int, object_fetch: ObjectFetch) -> None:
        """Blocks of this stripe have landed here."""
        for stream in self._starved_streams.pop((file, stripe), ()):
            if not stream.is_ended:
                self._refill_stream(stream, object_fetch)

    def stream_ended(self, stream: SimulatedStream) -> None:
        """All of it is sent, or nobody wants it any more."""
        request = self._request_by_stream.pop(stream, None)
        if request is None:
            return
        stream.is_ended = True
        self._promised_bytes -= len(request.blocks) * self._world.setting.block
        self._streams_used -= 1
        self._release_connection(request.client_number)
        if self._stream_queue:
            self.start_sending(self._stream_queue.popleft())

    def lose_power(self) -> None:
        """The power fails: who waits for us notices later, by itself."""
        for stream in self._request_by_stream:
            stream.is_ended = True
        self._request_by_stream.clear()
        self._starved_streams.clear()
        self._stream_queue.clear()
        self._backlog.clear()
