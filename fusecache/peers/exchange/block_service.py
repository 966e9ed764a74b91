"""What this node gives to others: blocks it has, blocks on their way to it, and those it is the one to fetch.

All of it runs in the trio thread but for what is said to run in a thread. Loads that were asked for are kept open for
a moment, since the next stripe of the same object will be asked for soon.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio
import xxhash

from fusecache.blocks import block_length
from fusecache.checksum import block_checksum
from fusecache.errors import AttestationError, FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.waiter import Waiter
from fusecache.peers.exchange import policy
from fusecache.peers.exchange.dependencies import StripeId
from fusecache.peers.exchange.state import ExchangeState
from fusecache.peers.member import Member, NodeInfo
from fusecache.peers.outgoing import OutgoingBytes
from fusecache.peers.profiles import PeerProfiles
from fusecache.peers.transport.server import BlockResponse, Piece
from fusecache.peers.transport.wire import BlockRequest, RequestError
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_FETCH_KEPT_OPEN = 10.0
"""Seconds that a load stays open after it was asked for."""


class BlockService:
    """See fusecache.peers.transport.server.Node. `sources`: identity of an origin -> name of its source."""

    def __init__(
        self,
        get_node_info: Callable[[], NodeInfo],
        state: ExchangeState,
        fetch_service: FetchService,
        store: BlockStore,
        source_by_identity: Mapping[str, str],
        *,
        streams: int,
        render_metrics: Callable[[], str],
        peer_profiles: PeerProfiles | None = None,
    ) -> None:
        self.responses_in_progress = 0
        """Answers under way."""
        self.queued_requests = 0
        """Requests that wait for their turn."""
        self.refused_requests = 0
        """Requests answered 503 since the start."""
        self._get_node_info = get_node_info
        self._state = state
        self._members = state.members
        self._fetch_service = fetch_service
        self._store = store
        self._source_by_identity = source_by_identity
        self._render_metrics = render_metrics
        self._peer_profiles = peer_profiles
        self._stream_slots = trio.Semaphore(streams)
        self._own_name = state.own_name
        self._relay_trees = policy.RelayTrees(self._own_name)
        self._members_of_urls: tuple[Member, ...] = ()
        self._url_by_name: dict[str, str] = {}
        self._kept_fetches: dict[ObjectId, tuple[ObjectFetch, float]] = {}

    async def close_idle_fetches(self) -> None:
        """Close loads that nobody asked for lately; until cancelled, then all of them."""
        try:
            while True:
                await trio.sleep(_FETCH_KEPT_OPEN / 4)
                limit = time.monotonic() - _FETCH_KEPT_OPEN
                old = [object_id for object_id, (_, used) in self._kept_fetches.items() if used < limit]
                for object_fetch in [self._kept_fetches.pop(object_id)[0] for object_id in old]:
                    await trio.to_thread.run_sync(self._fetch_service.release_fetch, object_fetch)
        finally:
            kept, self._kept_fetches = self._kept_fetches, {}
            for object_fetch, _ in kept.values():
                self._fetch_service.release_fetch(object_fetch)

    # -- what a server asks

    def node_info(self) -> NodeInfo:
        """See Node."""
        return self._get_node_info()

    def metrics_page(self) -> str:
        """See Node."""
        return self._render_metrics()

    def coverage(self) -> list[dict[str, Any]]:
        """See Node."""
        return [
            {
                "id": info.id,
                "source": info.version.origin,
                "key": info.version.key,
                "size": info.version.size,
                "cached_bytes": info.present_bytes,
            }
            for info in self._store.objects()
        ]

    def load_profile(self, name: str, caller: str, caller_has_profile: bool) -> bytes | None:
        """See Node."""
        if self._peer_profiles is None:
            return None
        data = self._peer_profiles.load_profile(name)
        if data is None and caller_has_profile:
            self._peer_profiles.fetch_offered(name, caller)
        return data

    def count_sent(self, caller: str, nbytes: int) -> None:
        """See Node."""
        self._state.traffic.count_sent(caller, nbytes)

    async def begin_response(self, request: BlockRequest) -> BlockResponse:
        """See Node."""
        if self._members.is_alive(request.caller):
            self._members.mark_heard(request.caller)
        if request.block_size not in (None, self._store.block_size):
            raise RequestError(409, f"the blocks here have {self._store.block_size} bytes")
        version = request.version or self._store.version_of(request.object_id)
        if version is None:
            raise RequestError(404, "nothing of this object is here")
        source = self._source_by_identity.get(version.origin)
        if source is None:
            raise RequestError(404, "this node does not serve the object's source")
        object_fetch = await self._get_fetch(version, source)
        handed_over = False
        try:
            offer = await self._prepare_response(object_fetch, request)
            handed_over = True
            return offer
        finally:
            if not handed_over:
                await trio.to_thread.run_sync(self._fetch_service.release_fetch, object_fetch)

    def _open_fetch(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """Open the version where this node has most of it: the caller asks for what is here."""
        with self._store.open_in_place(version):
            return self._fetch_service.open_object(version, source)

    async def _get_fetch(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """Opened once more."""
        kept = self._kept_fetches.get(version.id)
        if kept is not None and self._fetch_service.reopen(kept[0]):
            self._kept_fetches[version.id] = kept[0], time.monotonic()
            return kept[0]
        try:
            object_fetch = await trio.to_thread.run_sync(self._open_fetch, version, source)
        except FusecacheError as error:
            raise RequestError(503, str(error), {"Retry-After": "1"}) from None
        if self._fetch_service.reopen(object_fetch):
            before = self._kept_fetches.get(version.id)
            self._kept_fetches[version.id] = object_fetch, time.monotonic()
            if before is not None:
                await trio.to_thread.run_sync(self._fetch_service.release_fetch, before[0])
        return object_fetch

    async def _prepare_response(self, object_fetch: ObjectFetch, request: BlockRequest) -> BlockResponse:
        stored = object_fetch.stored
        blocks = request.blocks
        if blocks.stop > stored.block_count:
            raise RequestError(400, f"the object has {stored.block_count} blocks")
        if isinstance(object_fetch.gone_error, AttestationError):
            raise RequestError(404, "these bytes are in quarantine: they are not what their manifest says")
        if object_fetch.gone_error is not None:
            raise RequestError(410, "the origin has another version of the object")
        rankings = self._state.rankings
        number = rankings.stripe_of(blocks.start, stored.block_size)
        stripe = (object_fetch.version.id, number)
        ranking = rankings.ranking_of(object_fetch.version.id, number)
        is_acting_owner = policy.is_acting_owner(ranking, self._own_name, request.failed_nodes)
        if not all(stored.is_present(block) or stored.is_unverified(block) for block in blocks):
            may_serve = policy.may_serve(
                ranking,
                self._own_name,
                len(self._members.members()),
                failed_nodes=request.failed_nodes,
                hops=request.hops,
                stored_only=request.stored_only,
                comes_from_caller=request.caller in self._state.dependencies.upstream_nodes(stripe),
                is_coming=lambda: self._fetch_service.are_stored_or_in_flight(object_fetch, blocks),
            )
            if not may_serve and request.stored_only:
                raise RequestError(404, "not all of these blocks are stored here")
            if not may_serve:
                owner = ranking[0].name if ranking else ""
                raise RequestError(421, f"these blocks are for node {owner} to fetch", owner=owner)
        self._redirect_request(request, stripe)
        await self._wait_for_slot(request)
        certain = functools.partial(self._arrival_certain_at, stripe, is_acting_owner)
        return _StoredBlockResponse(
            self, self._fetch_service, object_fetch, request, certain, self._state.outgoing
        )

    def _arrival_certain_at(self, stripe: StripeId, is_acting_owner: bool) -> float:
        """When it was last certain that blocks of a stripe come to this node, as time.monotonic(). An acting owner is
        always certain to fetch it, unless it asks others for it (it was sent on to one before its owner died, or stands
        in for a slow one): they may be waiting for the very caller that is kept waiting."""
        if is_acting_owner and not self._state.dependencies.upstream_nodes(stripe):
            return time.monotonic()
        return self._state.dependencies.arrival_certain_at(stripe)

    def _redirect_request(self, request: BlockRequest, stripe: StripeId) -> None:
        """Send the caller on to another holder, if it is that one's turn. Raises RequestError 307."""
        if request.stored_only or not request.caller:
            return
        members = self._members.members()
        if members is not self._members_of_urls:
            self._members_of_urls, self._url_by_name = (
                members,
                {member.name: member.url for member in members},
            )
        self._state.receiver_rates.record_rate(request.caller, request.receive_rate)
        found = self._relay_trees.choose_sender(
            stripe,
            request.caller,
            self._url_by_name,
            len(request.blocks) * self._store.block_size,
            failed_nodes=request.failed_nodes,
            caller_unsent=request.unsent_bytes,
            own_unsent=self._state.outgoing.unsent_bytes,
            no_redirect=request.direct,
            hops=request.hops,
        )
        if found != self._own_name:
            raise RequestError(
                307, f"node {found} has them, too", {"Location": self._url_by_name[found] + request.target}
            )

    async def _wait_for_slot(self, request: BlockRequest) -> None:
        self.queued_requests += 1
        try:
            with trio.move_on_after(min(policy.MAX_QUEUED, request.deadline / 2)) as scope:
                await self._stream_slots.acquire()
        finally:
            self.queued_requests -= 1
        if scope.cancelled_caught:
            self.refused_requests += 1
            raise RequestError(503, "too much to do: ask again", {"Retry-After": f"{policy.RETRY_AFTER:.0f}"})
        self.responses_in_progress += 1

    def response_ended(self, object_fetch: ObjectFetch, unsent_bytes: int) -> None:
        """An offer was closed, `unsent` bytes of it were not sent."""
        self._state.outgoing.settle(unsent_bytes)
        self.responses_in_progress -= 1
        self._stream_slots.release()
        self._fetch_service.release_fetch(object_fetch)


class _StoredBlockResponse:
    """See fusecache.peers.transport.server.Offer."""

    def __init__(
        self,
        service: BlockService,
        fetch_service: FetchService,
        object_fetch: ObjectFetch,
        request: BlockRequest,
        arrival_certain_at: Callable[[], float],
        outgoing: OutgoingBytes,
    ) -> None:
        """`coming` tells when it was last certain that the blocks come to us, as time.monotonic()."""
        stored = object_fetch.stored
        self.block_lengths: Sequence[int] = [
            block_length(block, object_fetch.version.size, stored.block_size) for block in request.blocks
        ]
        self._unsent_bytes = sum(self.block_lengths)
        self._outgoing = outgoing
        outgoing.promise(self._unsent_bytes)
        self.all_stored = all(stored.is_present(block) for block in request.blocks)
        self._service = service
        self._fetch_service = fetch_service
        self._object_fetch = object_fetch
        self._blocks = request.blocks
        self._position = 0
        self._handed_bytes = 0
        self._arrival_certain_at = arrival_certain_at
        self._last_ready_at = time.monotonic()
        """When the last blocks were there."""
        self._is_urgent = request.urgent
        self._deadline = trio.current_time() + request.deadline
        self._waiter: Waiter | None = None
        self._block_arrived = trio.Event()
        self._trio_token = trio.lowlevel.current_trio_token()
        self._is_closed = False

    async def next_pieces(self) -> list[Piece] | float:
        """See Offer."""
        self._count_sent()
        pieces = self._present_pieces() if self._waiter is None else []
        while not pieces:
            found = await self._wait_for_block()
            if isinstance(found, float):
                return found
            pieces = found
        self._last_ready_at = time.monotonic()
        self._position += len(pieces)
        self._handed_bytes = sum(piece.length for piece in pieces)
        return pieces

    def _count_sent(self) -> None:
        self._outgoing.settle(self._handed_bytes)
        self._unsent_bytes -= self._handed_bytes
        self._handed_bytes = 0

    def _present_pieces(self) -> list[Piece]:
        stored, pieces, total = self._object_fetch.stored, [], 0
        for at in range(self._position, len(self._blocks)):
            block = self._blocks[at]
            checksum = stored.blocks.checksum(block)
            if not stored.is_present(block) or not checksum or total > policy.RUN_BYTES:
                break
            length = self.block_lengths[at]
            pieces.append(Piece(block, checksum, length, stored.fileno(), block * stored.block_size))
            total += length
        return pieces

    async def _wait_for_block(self) -> list[Piece] | float:
        block, length = self._blocks[self._position], self.block_lengths[self._position]
        if self._waiter is None and (found := await self._request_block(block, length)):
            return found
        assert self._waiter is not None
        with trio.move_on_at(min(self._deadline, trio.current_time() + policy.NOTICE_EVERY)) as scope:
            await self._block_arrived.wait()
        if scope.cancelled_caught and not self._block_arrived.is_set():
            if trio.current_time() >= self._deadline:
                raise trio.TooSlowError
            return self._certainty_age()
        waiter, self._waiter = self._waiter, None
        if waiter.error is not None:
            raise waiter.error
        if block in waiter.pieces:
            data = waiter.pieces[block]
            return [Piece(block, await trio.to_thread.run_sync(_checksum_of, data), length, data=data)]
        return self._present_pieces()

    def _certainty_age(self) -> float:
        """Seconds since it was certain that there is reason to wait. Raises trio.TooSlowError when that is long ago."""
        certain = max(self._arrival_certain_at(), self._last_ready_at)
        age = time.monotonic() - certain
        if age > policy.MAX_UNCERTAIN:
            raise trio.TooSlowError
        return age

    async def _request_block(self, block: int, length: int) -> list[Piece]:
        """Have a block brought; what is there already is returned."""
        landed = self._block_arrived = trio.Event()

        def settled(_waiter: Waiter) -> None:
            try:
                self._trio_token.run_sync_soon(landed.set)
            except trio.RunFinishedError:
                _log.debug("a block landed for a server that has ended")

        offset = block * self._object_fetch.stored.block_size
        waiter = self._fetch_service.request_bytes(
            self._object_fetch, offset, length, settled, by_reader=False, urgent=self._is_urgent
        )
        if waiter is None:
            pieces = self._present_pieces()
            return pieces or [await self._read_piece(block, offset, length)]
        self._waiter = waiter
        return []

    async def _read_piece(self, block: int, offset: int, length: int) -> Piece:
        """A present block whose checksum another process has cleared."""
        data = await trio.to_thread.run_sync(
            self._fetch_service.read_bytes, self._object_fetch, offset, length
        )
        return Piece(block, await trio.to_thread.run_sync(_checksum_of, data), length, data=data)

    def close(self) -> None:
        """See Offer."""
        if not self._is_closed:
            self._is_closed = True
            if self._waiter is not None:
                self._fetch_service.cancel_waiter(self._waiter)
            self._service.response_ended(self._object_fetch, self._unsent_bytes)


def _checksum_of(data: bytes) -> int:
    digest = xxhash.xxh3_64()
    digest.update(data)
    return block_checksum(digest)
