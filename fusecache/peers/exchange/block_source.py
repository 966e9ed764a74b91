"""Where a flight's blocks come from in a cluster: the stripe's owner, another node, or the origin.

Who is asked, and in which order, is in choice.py. A flight asks the nodes ahead of this one in the stripe's ranking;
when none of them answers, or this node is the owner, the next in order whether they have the stripe stored; then the
origin: as the owner freely, otherwise under a budget that all nodes share. A node that is busy is asked again, never
passed over for the origin.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from fusecache.bounded import BoundedDict
from fusecache.errors import CancelledReadError, UnavailableError
from fusecache.fetch.block_source import BlockSink, Route, write_chunks
from fusecache.origin.interface import Origin
from fusecache.peers.errors import (
    PeerBusyError,
    PeerConnectTimeoutError,
    PeerError,
    PeerMissError,
    PeerRedirectError,
    PeerRefusedError,
)
from fusecache.peers.exchange import policy
from fusecache.peers.exchange.breaker import CircuitBreaker, SpeedComparison
from fusecache.peers.exchange.transfer_monitor import PeerTransfer, TransferMonitor
from fusecache.peers.member import Member
from fusecache.peers.membership.placement import rank_members
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.outgoing import OutgoingBytes
from fusecache.peers.transport.client import PeerClient
from fusecache.peers.transport.wire import BlockRequest
from fusecache.semaphore import ResizableSemaphore
from fusecache.throughput import PeakThroughput
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_NOT_STORED_TTL = 10.0
"""Seconds for which a node that had nothing of an object is not asked again whether it has."""
_MAX_NOT_STORED = 10_000
_MAX_SILENCE = 20.0
"""Seconds without a byte, or word that the node waits itself, after which one that is alive is passed over all the
same."""
_RANDOM_CANDIDATES = 2
_STORED_HEDGE_EVERY = 0.5
"""Seconds between looks, of all flights together, at whether other nodes have what is waited for. When each flight
looked every second, the last ten seconds of 16 nodes in the lab went into questions."""
_MAX_RANKINGS = 10_000
"""Kept at a time, as long as the members stay the same."""


@dataclass
class PeerTraffic:
    """Counters of one node since the start. Guarded by the Exchange's lock."""

    bytes_in: int = 0
    bytes_out: int = 0
    requests: int = 0
    errors: int = 0
    bad_blocks: int = 0
    first_byte_seconds: float | None = None
    """Seconds until an answer begins, the mean of the last ones."""


@dataclass
class PeerSourceStats:
    """Counters since the start. Guarded by the Exchange's lock."""

    bytes_from_peers: int = 0
    fallbacks: int = 0
    """Flights that went to the origin though the stripe is another node's."""
    redirects: int = 0
    busy_answers: int = 0
    hedges: int = 0
    traffic_by_node: dict[str, PeerTraffic] = field(default_factory=dict)


class _HedgedError(Exception):
    """A second request was answered while the first was slow."""

    def __init__(
        self,
        member: Member,
        answer: Iterator[int | memoryview],
        close: Callable[[], None],
        *,
        is_slow: bool,
    ) -> None:
        super().__init__(member.name)
        self.is_slow = is_slow
        self.member = member
        self.answer = answer
        self.close = close


class PeerBlockSource:
    """The supplier of a node in a cluster; see loader.Supplier. Thread-safe."""

    def __init__(
        self,
        own_name: str,
        members: MembershipTable,
        client: PeerClient,
        origins: Mapping[str, Origin],
        *,
        stripe_bytes: int,
        peer_workers: int,
        concurrency: int,
        fallback_requests: int,
        outgoing: OutgoingBytes,
        stores_remote: bool = True,
    ) -> None:
        self.peer_workers = peer_workers
        self.stats = PeerSourceStats()
        self.breaker = CircuitBreaker()
        self.speeds = SpeedComparison()
        self._peak_throughput = PeakThroughput()
        self._outgoing = outgoing
        self.receiver_rates = policy.ReceiverRates()
        self._own_name = own_name
        self._members = members
        self._client = client
        self._origins = origins
        self._stripe_bytes = stripe_bytes
        self._stores_remote = stores_remote
        self._lock = threading.Lock()
        self._transfers_in_progress = 0
        self._next_stored_hedge_at = 0.0
        """When a flight may look elsewhere again."""
        self._not_stored: BoundedDict[tuple[str, ObjectId], None] = BoundedDict(
            _MAX_NOT_STORED, max_age=_NOT_STORED_TTL
        )
        self._upstream_by_stripe: dict[tuple[ObjectId, int], list[str]] = {}
        self._certain_at_by_stripe: dict[tuple[ObjectId, int], float] = {}
        self._ranked_members: tuple[Member, ...] = ()
        self._rankings: BoundedDict[tuple[ObjectId, int], list[Member]] = BoundedDict(_MAX_RANKINGS)
        self._owner_slots = ResizableSemaphore(
            lambda: policy.origin_request_limit(concurrency, len(members.members()))
        )
        self._fallback_slots = ResizableSemaphore(
            lambda: policy.fallback_request_limit(fallback_requests, len(members.members()))
        )

    @property
    def transfers_in_progress(self) -> int:
        """Answers of other nodes under way."""
        return self._transfers_in_progress

    def traffic(self, name: str) -> PeerTraffic:
        """The counters of a node, to be read."""
        with self._lock:
            return self.stats.traffic_by_node.setdefault(name, PeerTraffic())

    def count_sent_bytes(self, name: str, nbytes: int) -> None:
        """So many bytes went to a node."""
        with self._lock:
            self.stats.traffic_by_node.setdefault(name, PeerTraffic()).bytes_out += nbytes

    def peak_throughput(self) -> float | None:
        """Bytes per second that the other nodes gave in their best second of late; None: nothing is known."""
        with self._lock:
            return self._peak_throughput.bytes_per_second(time.monotonic())

    def max_prefetch_flights(self) -> int:
        """See loader.Supplier."""
        return self.receiver_rates.max_prefetch_flights(self.peak_throughput(), self.peer_workers)

    def route_of(self, version: ObjectVersion, block_size: int) -> Route | None:
        """See loader.Supplier."""
        members = self._members.members()
        return policy.build_route(
            version,
            block_size,
            self._stripe_bytes,
            members,
            self._own_name,
            stores_remote=self._stores_remote,
        )

    def stripe_of(self, block: int, block_size: int) -> int:
        """Number of the stripe that holds a block."""
        return block // max(1, self._stripe_bytes // block_size)

    def upstream_nodes(self, object_id: ObjectId, stripe: int) -> Collection[str]:
        """The nodes from which blocks of this stripe are to come, who may not have them yet."""
        return self._upstream_by_stripe.get((object_id, stripe), ())

    def _add_upstream(self, stripe: tuple[ObjectId, int], name: str) -> None:
        with self._lock:
            self._upstream_by_stripe.setdefault(stripe, []).append(name)

    def _remove_upstream(self, stripe: tuple[ObjectId, int], name: str) -> None:
        with self._lock:
            names = self._upstream_by_stripe[stripe]
            names.remove(name)
            if not names:
                del self._upstream_by_stripe[stripe]

    def mark_arrival_certain(self, transfer: PeerTransfer, when: float) -> None:
        """At that time it was certain that what is left of a flight comes to us."""
        self._certain_at_by_stripe[
            transfer.version.id, self.stripe_of(transfer.next_block, transfer.block_size)
        ] = when

    def arrival_certain_at(self, object_id: ObjectId, stripe: int) -> float:
        """When it was last certain that blocks of this stripe come to us, as time.monotonic()."""
        return self._certain_at_by_stripe.get((object_id, stripe), 0.0)

    def ranking_of(self, object_id: ObjectId, stripe: int) -> list[Member]:
        """The nodes for one stripe, the owner first."""
        members = self._members.members()
        with self._lock:
            if members is not self._ranked_members:
                self._ranked_members = members
                self._rankings.clear()
            found = self._rankings.get((object_id, stripe))
        if found is None:
            # all nodes ask the owner for the same stripe: 2 ms each in a cluster of 10,000
            found = rank_members(object_id, stripe, members, policy.ranking_length(len(members)))
            with self._lock:
                if members is self._ranked_members:
                    self._rankings[object_id, stripe] = found
        return found

    # -- the loader's side

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
        """Write the blocks into the sink: from the nodes that have them or fetch them, or else from the origin."""
        flight = PeerTransfer(
            version, blocks, block_size, deadline, cancelled, blocks.start, sink, is_urgent=urgent
        )
        order = self.ranking_of(version.id, self.stripe_of(blocks.start, block_size))
        may_have = functools.partial(self._may_have, version.id)
        members = len(self._members.members())
        for turn in policy.source_steps(
            order, self._own_name, flight.failed_nodes, self.breaker.may_admit, may_have, members
        ):
            if turn.member is None:
                self._read_from_origin(flight, source, turn.is_owner)
                return
            if not turn.stored_only and not self.breaker.begin_trial(turn.member.name):
                flight.failed_nodes.append(turn.member.name)  # it became another request's trial meanwhile
                continue
            flight.substitutes = turn.substitutes
            self._ask_node(flight, turn.member, turn.stored_only)
            if not flight.remaining:
                return

    def _read_from_origin(self, transfer: PeerTransfer, source: str, is_owner: bool) -> None:
        if not is_owner:
            with self._lock:
                self.stats.fallbacks += 1
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

    def _may_have(self, object_id: ObjectId, member: Member) -> bool:
        with self._lock:
            return (member.name, object_id) not in self._not_stored

    # -- one node

    def _ask_node(self, transfer: PeerTransfer, member: Member, stored_only: bool = False) -> None:
        """What this node gives of what is left, which may be nothing. Raises CancelledReadError, UnavailableError."""
        asking = policy.RedirectState(member, member)
        silent: set[str] = set()
        while True:
            self._raise_if_over(transfer)
            target = asking.target
            try:
                self._stream_blocks(
                    transfer,
                    target,
                    stored_only=stored_only,
                    no_redirect=asking.no_redirect,
                    hops=asking.hops,
                )
                return
            except PeerBusyError as busy:
                with self._lock:
                    self.stats.busy_answers += 1
                self.breaker.request_undecided(target.name)
                self._wait_before_retry(transfer, busy.retry_after)
                continue
            except PeerRedirectError as elsewhere:
                self.breaker.request_succeeded(target.name)
                if asking.follow_redirect(self._member_at(elsewhere.url), self._own_name):
                    with self._lock:
                        self.stats.redirects += 1
                continue
            except PeerMissError:
                self.breaker.request_undecided(target.name)
                if stored_only:
                    with self._lock:
                        self._not_stored[target.name, transfer.version.id] = None
            except PeerError as error:
                if isinstance(error, PeerConnectTimeoutError) and self._admit_reconnect(target, silent):
                    continue
                self._record_failure(target, error, is_redirected=asking.is_redirected)
            if transfer.has_partial_block:
                transfer.has_partial_block = False
                transfer.sink.restart_block()
            if asking.is_redirected:
                asking.return_to_member()
                continue
            if not stored_only and member.name not in transfer.failed_nodes:
                transfer.failed_nodes.append(member.name)
            return

    def _admit_reconnect(self, member: Member, silent_nodes: set[str]) -> bool:
        """Whether to connect to a node once more. Where many send at once a connection's first packets get lost, and
        that is no reason to ask the origin. A node that is gone is known to be by then."""
        self._members.mark_suspect(member.name)
        if member.name in silent_nodes or not self._members.is_alive(member.name):
            return False
        silent_nodes.add(member.name)
        self.breaker.request_undecided(member.name)
        return True

    def _record_failure(self, member: Member, error: PeerError, *, is_redirected: bool) -> None:
        self._members.mark_suspect(member.name)
        if is_redirected:
            # it passed on what it got itself, and may have lost that: its fault shows when it is asked directly
            self.breaker.request_undecided(member.name)
            return
        with self._lock:
            self.stats.traffic_by_node.setdefault(member.name, PeerTraffic()).errors += 1
        if self.breaker.describe_node(member.name)[0] != str(error):
            log = _log.warning if isinstance(error, PeerRefusedError) else _log.info
            log("node %s did not give its blocks: %s", member.name, error)
        self.breaker.request_failed(member.name, str(error))

    def _member_at(self, url: str) -> Member | None:
        for member in self._members.members():
            if url == member.url or url.startswith(member.url + "/"):
                return member
        return None

    def _raise_if_over(self, transfer: PeerTransfer) -> None:
        if transfer.cancelled():
            raise CancelledReadError(f"{transfer.version.key}: the reader went away")
        if time.monotonic() >= transfer.deadline:
            raise UnavailableError(f"{transfer.version.key}: not all bytes came before the deadline")

    def _wait_before_retry(self, transfer: PeerTransfer, seconds: float) -> None:
        until = time.monotonic() + seconds
        pause = threading.Event()
        while (left := until - time.monotonic()) > 0:
            pause.wait(min(left, 0.25))
            self._raise_if_over(transfer)

    def _build_request(
        self, transfer: PeerTransfer, *, stored_only: bool, no_redirect: bool, hops: int
    ) -> BlockRequest:
        return BlockRequest(
            transfer.version.id,
            transfer.remaining,
            transfer.version,
            transfer.block_size,
            max(0.001, min(120.0, transfer.deadline - time.monotonic())),
            hops,
            stored_only,
            tuple(transfer.failed_nodes),
            no_redirect,
            urgent=transfer.is_urgent,
            unsent_bytes=self._outgoing.unsent_bytes,
            receive_rate=round(self.peak_throughput() or 0),
            caller=self._own_name,
        )

    def _stream_blocks(
        self, transfer: PeerTransfer, member: Member, *, stored_only: bool, no_redirect: bool, hops: int
    ) -> None:
        request = self._build_request(transfer, stored_only=stored_only, no_redirect=no_redirect, hops=hops)
        stripe = (transfer.version.id, self.stripe_of(transfer.next_block, transfer.block_size))
        watch = TransferMonitor(self, transfer, member, may_hedge=not stored_only)
        waits_for = None if stored_only else member.name
        if waits_for is not None:
            self._add_upstream(stripe, waits_for)
        with self._lock:
            self._transfers_in_progress += 1
            self.stats.traffic_by_node.setdefault(member.name, PeerTraffic()).requests += 1
        try:
            items: Iterator[int | memoryview] | None = None
            close: Callable[[], None] = _close_nothing
            while True:
                try:
                    with contextlib.ExitStack() as stack:
                        if items is None:
                            began = time.monotonic()
                            answer = self._client.request_blocks(
                                member.url, request, transfer.version.size, watch
                            )
                            self._record_first_byte(member, time.monotonic() - began)
                            items, close = iter(answer), answer.close
                            watch.all_stored = answer.all_stored
                        stack.callback(close)
                        self._receive_blocks(transfer, items, watch)
                    self.breaker.request_succeeded(watch.member.name)
                    return
                except _HedgedError as hedged:
                    if hedged.is_slow:
                        self.breaker.avoid_slow_node(watch.member.name)
                        _log.info("node %s is slow: %s goes on", watch.member.name, hedged.member.name)
                    if transfer.has_partial_block:
                        transfer.has_partial_block = False
                        transfer.sink.restart_block()
                    watch.switch_member(hedged.member)
                    items, close = hedged.answer, hedged.close
                    if waits_for is not None:
                        self._remove_upstream(stripe, waits_for)
                    waits_for = hedged.member.name if hedged.is_slow else None
        finally:
            watch.report_progress()
            if waits_for is not None:
                self._remove_upstream(stripe, waits_for)
            with self._lock:
                self._transfers_in_progress -= 1
                self._certain_at_by_stripe.pop(stripe, None)

    def _record_first_byte(self, member: Member, seconds: float) -> None:
        self._members.mark_heard(member.name)
        with self._lock:
            traffic = self.stats.traffic_by_node.setdefault(member.name, PeerTraffic())
            known = traffic.first_byte_seconds
            traffic.first_byte_seconds = seconds if known is None else 0.8 * known + 0.2 * seconds

    def _receive_blocks(
        self, transfer: PeerTransfer, items: Iterator[int | memoryview], monitor: TransferMonitor
    ) -> None:
        left = 0
        for item in items:
            if isinstance(item, int):
                left = min(
                    transfer.block_size, transfer.version.size - transfer.next_block * transfer.block_size
                )
                transfer.sink.begin_block(item)
                continue
            transfer.has_partial_block = True
            left -= len(item)
            monitor.received_bytes += len(item)
            transfer.sink.write(item)
            if left:
                continue
            transfer.has_partial_block = False
            if not transfer.sink.end_block():
                self._record_bad_block(monitor.member, transfer)
                raise PeerError(f"{monitor.member.url}: sent wrong bytes")
            transfer.next_block += 1
            monitor.block_completed()

    def _record_bad_block(self, member: Member, transfer: PeerTransfer) -> None:
        self.breaker.bad_block_received(member.name)
        with self._lock:
            self.stats.traffic_by_node.setdefault(member.name, PeerTraffic()).bad_blocks += 1
        _log.warning(
            "node %s (%s) sent wrong bytes for block %d of %s: it is avoided; check its memory and disk",
            member.name,
            member.url,
            transfer.next_block,
            transfer.version.key,
        )

    def count_received(self, member: Member, nbytes: int, seconds: float, *, stored: bool) -> None:
        """So many bytes came from a node, and took so long."""
        self.speeds.record_transfer(member.name, nbytes, seconds, stored=stored)
        if nbytes:
            self._members.mark_heard(member.name)
            with self._lock:
                self.stats.bytes_from_peers += nbytes
                self._peak_throughput.add_arrival(time.monotonic(), nbytes)
                self.stats.traffic_by_node.setdefault(member.name, PeerTraffic()).bytes_in += nbytes

    def check_transfer(self, transfer: PeerTransfer, member: Member, silent_seconds: float) -> None:
        """While nothing comes from a node. Raises PeerError when it is not worth waiting for, or what ends a flight."""
        self._raise_if_over(transfer)
        if not self._members.is_alive(member.name):
            raise PeerError(f"{member.url}: the node is not alive")
        if silent_seconds > _MAX_SILENCE:
            raise PeerError(f"{member.url}: nothing came for {_MAX_SILENCE:g} s")

    @property
    def is_mostly_idle(self) -> bool:
        """Whether most of the crew has nothing to do: what is under way is the last there is."""
        return self._transfers_in_progress < self.peer_workers // 8

    def hedge_transfer(self, transfer: PeerTransfer, current_member: Member, *, stored_only: bool) -> None:
        """Ask another node for what is left, too: any that has it stored, or the next in order, which then fetches it.
        While that one is waited for it gets nothing of this from us, or both would wait until the deadline. Raises
        _HedgedError if it has an answer."""
        if stored_only:
            with self._lock:
                now = time.monotonic()
                if now < self._next_stored_hedge_at:
                    return
                self._next_stored_hedge_at = now + _STORED_HEDGE_EVERY
            others = [
                member
                for member in self._members.members()
                if member.name not in (self._own_name, current_member.name, *transfer.failed_nodes)
            ]
            asked = random.sample(others, min(len(others), _RANDOM_CANDIDATES))
        else:
            asked = [member for member in transfer.substitutes if member.name != current_member.name]
        for member in asked:
            if not self.breaker.begin_trial(member.name):
                continue
            again = PeerTransfer(
                transfer.version,
                transfer.blocks,
                transfer.block_size,
                transfer.deadline,
                transfer.cancelled,
                transfer.next_block,
                transfer.sink,
                is_urgent=transfer.is_urgent,
                failed_nodes=list(transfer.failed_nodes)
                if stored_only
                else [*transfer.failed_nodes, current_member.name],
            )
            request = self._build_request(again, stored_only=stored_only, no_redirect=True, hops=0)
            watch = TransferMonitor(self, again, member, may_hedge=False)
            stripe = (transfer.version.id, self.stripe_of(transfer.next_block, transfer.block_size))
            if not stored_only:
                self._add_upstream(stripe, member.name)  # the flight goes on with that if it has an answer
            try:
                answer = self._client.request_blocks(member.url, request, transfer.version.size, watch)
            except BaseException as error:
                if not stored_only:
                    self._remove_upstream(stripe, member.name)
                if not isinstance(error, PeerError):
                    raise
                _log.debug("node %s instead of %s: %s", member.name, current_member.name, error)
                self.breaker.request_undecided(member.name)
                continue
            with self._lock:
                self.stats.hedges += 1
            raise _HedgedError(member, iter(answer), answer.close, is_slow=not stored_only)


def _close_nothing() -> None:
    """There is nothing to close yet."""
