"""Where a flight's blocks come from in a cluster: the stripe's owner, another node, or the origin.

Which nodes are asked, and in which order, is decided in policy.py, and what follows from each answer in
stripe_request.py. A flight asks the nodes ahead of this one in the stripe's ranking; when none of them answers, or this
node is the owner, it asks the next in order whether they have the stripe stored; then it reads the origin: freely if
this node is the owner, otherwise under a budget that all nodes share. A node that is busy is asked again, never passed
over for the origin.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

from fusecache.fetch.block_source import BlockSink, Route, write_chunks
from fusecache.origin.interface import Origin
from fusecache.peers.exchange import policy
from fusecache.peers.exchange.hedger import Hedger
from fusecache.peers.exchange.misses import MissTable
from fusecache.peers.exchange.state import ExchangeState
from fusecache.peers.exchange.stripe_request import PeerKnowledge, StripeRequest
from fusecache.peers.exchange.traffic import PeerSourceStats
from fusecache.peers.exchange.transfer import PeerTransfer
from fusecache.peers.exchange.transfer_driver import TransferDriver
from fusecache.peers.transport.client import PeerClient
from fusecache.semaphore import ResizableSemaphore
from fusecache.types import ObjectVersion


class PeerBlockSource:
    """The block source of a node in a cluster. Thread-safe; it has no lock of its own, and its tables are in
    `state`."""

    def __init__(
        self,
        state: ExchangeState,
        client: PeerClient,
        origins: Mapping[str, Origin],
        *,
        peer_workers: int,
        concurrency: int,
        fallback_requests: int,
        stores_remote: bool = True,
    ) -> None:
        """`origins` are the origins by the names of their sources; `concurrency` limits this node's requests to the
        origin for stripes of its own, `fallback_requests` those of the whole cluster for stripes of nodes that do not
        answer; `stores_remote` says whether this node stores stripes that other nodes own."""
        self.peer_workers = peer_workers
        self.state = state
        """The tables that the service which answers other nodes shares with this source."""
        self._client = client
        self._origins = origins
        self._stores_remote = stores_remote
        members = state.members.members
        hedger = Hedger(
            state.own_name,
            members,
            state.speeds,
            state.receiver_rates,
            lambda: policy.is_mostly_idle(state.traffic.transfers_in_progress, peer_workers),
            sample=random.sample,
        )
        self._knowledge = PeerKnowledge(state.own_name, state.breaker, hedger, MissTable(), time.monotonic)
        self._owner_slots = ResizableSemaphore(
            lambda: policy.origin_request_limit(concurrency, len(members()))
        )
        self._fallback_slots = ResizableSemaphore(
            lambda: policy.fallback_request_limit(fallback_requests, len(members()))
        )

    @property
    def stats(self) -> PeerSourceStats:
        """Counters since the start, to be read."""
        return self.state.traffic.stats

    def max_prefetch_flights(self) -> int:
        """Fewer than there are workers on a node whose link is much slower than the others'."""
        return self.state.receiver_rates.max_prefetch_flights(
            self.state.traffic.peak_throughput(), self.peer_workers
        )

    def route_of(self, version: ObjectVersion, block_size: int) -> Route | None:
        """The owners of the object's stripes among the members that are alive now; None: there are no other nodes."""
        return policy.build_route(
            version,
            block_size,
            self.state.rankings.stripe_bytes,
            self.state.members.members(),
            self.state.own_name,
            stores_remote=self._stores_remote,
        )

    def send_blocks(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        sink: BlockSink,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> None:
        """Write the blocks, which are of one stripe, into the sink: from nodes that have or fetch them, and from the
        origin as far as no node does. Raises CancelledReadError, UnavailableError, and what the origin and the sink
        raise."""
        transfer = PeerTransfer(
            version, blocks, block_size, deadline, cancelled, sink, urgent, next_block=blocks.start
        )
        rankings = self.state.rankings
        request = StripeRequest(
            self._knowledge,
            version.id,
            rankings.ranking_of(version.id, rankings.stripe_of(blocks.start, block_size)),
            len(self.state.members.members()),
            deadline=deadline,
            cancelled=cancelled,
        )
        rest = TransferDriver(self.state, self._client, request, transfer).run()
        if rest is not None:
            self._read_from_origin(transfer, source, rest.is_owner)

    def _read_from_origin(self, transfer: PeerTransfer, source: str, is_owner: bool) -> None:
        if not is_owner:
            self.state.traffic.count_fallback()
        slots = self._owner_slots if is_owner else self._fallback_slots
        with slots.hold_slot(time.monotonic, transfer.deadline, transfer.cancelled):
            offset = transfer.next_block * transfer.block_size
            length = min(transfer.blocks.stop * transfer.block_size, transfer.version.size) - offset
            chunks = self._origins[source].read_range(
                transfer.version, offset, length, deadline=transfer.deadline, cancelled=transfer.cancelled
            )
            write_chunks(
                chunks, transfer.remaining, transfer.block_size, transfer.version.size, transfer.sink
            )
