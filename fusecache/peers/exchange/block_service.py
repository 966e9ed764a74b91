"""Answers the requests of other nodes: with blocks that are stored here, blocks that are on their way here, and blocks
that this node is the one to fetch.

Everything runs in the trio thread, except methods whose docstring says that they run in a thread. An object that other
nodes ask for is kept open for a moment, since they will soon ask for its next stripe.
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
"""Seconds that an object stays open after the last request for it."""


class BlockService:
    """The PeerRequestHandler of a node. `source_by_identity`: identity of an origin -> name of its source;
    `render_metrics` makes the metrics page, in a thread; at most `streams` answers are under way at a time. Without
    `peer_profiles` the node has no profiles for others.

    A request passes these states, in the trio thread:

    | State | What happens | Next |
    |---|---|---|
    | new | it asks for what this node neither has nor fetches, or another holder is better | refused or redirected |
    | new | it may be answered | queued |
    | queued | a stream is free | in progress |
    | queued | none is free in time | refused (503) |
    | in progress | all blocks are sent, the caller is gone, or waiting is not worth while any more | ended |
    """

    def __init__(
        self,
        *,
        get_node_info: Callable[[], NodeInfo],
        state: ExchangeState,
        fetch_service: FetchService,
        store: BlockStore,
        source_by_identity: Mapping[str, str],
        streams: int,
        render_metrics: Callable[[], str],
        peer_profiles: PeerProfiles | None = None,
    ) -> None:
        self.responses_in_progress = 0
        """Answers under way, to be read from any thread."""
        self.queued_requests = 0
        """Requests that wait for a stream."""
        self.refused_requests = 0
        """Requests that waited for a stream in vain, since the start."""
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
        """Keep closing objects that no node has asked for lately, until cancelled; then close all of them."""
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

    # -- PeerRequestHandler

    def node_info(self) -> NodeInfo:
        """This node's introduction to others."""
        return self._get_node_info()

    def metrics_page(self) -> str:
        """The page for Prometheus. Runs in a thread."""
        return self._render_metrics()

    def coverage(self) -> list[dict[str, Any]]:
        """Bytes stored here of each object. Runs in a thread; waits until the store has read its index."""
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
        """The profile stored here. If there is none and the caller has it, takes it from there. Runs in a thread; does
        I/O."""
        if self._peer_profiles is None:
            return None
        data = self._peer_profiles.load_profile(name)
        if data is None and caller_has_profile:
            self._peer_profiles.fetch_offered(name, caller)
        return data

    def count_sent(self, caller: str, nbytes: int) -> None:
        """Counts bytes that a node was sent. Runs in a thread."""
        self._state.traffic.count_sent(caller, nbytes)

    async def begin_response(self, request: BlockRequest) -> BlockResponse:
        """Answer with blocks that are here or will come, once a stream is free. Raises RequestError: 307 to another
        holder, 400, 404, 409, 410, 421 (another node fetches these blocks) or 503."""
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
            response = await self._prepare_response(object_fetch, request)
            handed_over = True
            return response
        finally:
            if not handed_over:
                await trio.to_thread.run_sync(self._fetch_service.release_fetch, object_fetch)

    def _open_fetch(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """Open the version where this node has most of it: the caller asks for what is here."""
        with self._store.open_in_place(version):
            return self._fetch_service.open_object(version, source)

    async def _get_fetch(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """The object, open, with one more reference for the caller to release. Raises RequestError 503."""
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
            self._fetch_service,
            object_fetch,
            request,
            outgoing=self._state.outgoing,
            arrival_certain_at=certain,
            on_closed=self._response_closed,
        )

    def _arrival_certain_at(self, stripe: StripeId, is_acting_owner: bool) -> float:
        """When it was last certain that blocks of a stripe come to this node, as time.monotonic(). An acting owner is
        certain to fetch the stripe, unless it asks another node for it (it was redirected there before the owner died,
        or stands in for a slow node): that node may be waiting for the caller."""
        if is_acting_owner and not self._state.dependencies.upstream_nodes(stripe):
            return time.monotonic()
        return self._state.dependencies.arrival_certain_at(stripe)

    def _redirect_request(self, request: BlockRequest, stripe: StripeId) -> None:
        """Raises RequestError 307 when another holder of the stripe is to send it to the caller."""
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

    def _response_closed(self) -> None:
        self.responses_in_progress -= 1
        self._stream_slots.release()


class _StoredBlockResponse:
    """Blocks from the store as they arrive there: the BlockResponse of one request. Holds a reference to the object, a
    stream, and the promise of the bytes not sent yet, until it is closed."""

    def __init__(
        self,
        fetch_service: FetchService,
        object_fetch: ObjectFetch,
        request: BlockRequest,
        *,
        outgoing: OutgoingBytes,
        arrival_certain_at: Callable[[], float],
        on_closed: Callable[[], None],
    ) -> None:
        """Takes over the caller's reference to the object. `arrival_certain_at` tells when it was last certain that the
        blocks come here, as time.monotonic(); `on_closed` is called once, in the trio thread."""
        stored = object_fetch.stored
        self.block_lengths: Sequence[int] = [
            block_length(block, object_fetch.version.size, stored.block_size) for block in request.blocks
        ]
        self._unsent_bytes = sum(self.block_lengths)
        self._outgoing = outgoing
        outgoing.promise(self._unsent_bytes)
        self.all_stored = all(stored.is_present(block) for block in request.blocks)
        self._on_closed = on_closed
        self._fetch_service = fetch_service
        self._object_fetch = object_fetch
        self._blocks = request.blocks
        self._position = 0
        self._handed_bytes = 0
        self._arrival_certain_at = arrival_certain_at
        self._last_ready_at = time.monotonic()
        """When the last blocks were handed out, as time.monotonic()."""
        self._is_urgent = request.urgent
        self._deadline = trio.current_time() + request.deadline
        self._waiter: Waiter | None = None
        self._block_arrived = trio.Event()
        self._trio_token = trio.lowlevel.current_trio_token()
        self._is_closed = False

    async def next_pieces(self) -> list[Piece] | float:
        """Hand out the blocks that are here, a few at a time; if there are none, wait for policy.NOTICE_EVERY at
        most."""
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
        """Seconds since it was certain that the blocks come. Raises trio.TooSlowError when that is long ago."""
        certain = max(self._arrival_certain_at(), self._last_ready_at)
        age = time.monotonic() - certain
        if age > policy.MAX_UNCERTAIN:
            raise trio.TooSlowError
        return age

    async def _request_block(self, block: int, length: int) -> list[Piece]:
        """Ask the fetch service for a block. Returns the blocks that are there already; none: a waiter is set."""
        arrived = self._block_arrived = trio.Event()

        def on_settled(_waiter: Waiter) -> None:
            try:
                self._trio_token.run_sync_soon(arrived.set)
            except trio.RunFinishedError:
                _log.debug("a block arrived for a server that has ended")

        offset = block * self._object_fetch.stored.block_size
        waiter = self._fetch_service.request_bytes(
            self._object_fetch, offset, length, on_settled, by_reader=False, urgent=self._is_urgent
        )
        if waiter is None:
            pieces = self._present_pieces()
            return pieces or [await self._read_piece(block, offset, length)]
        self._waiter = waiter
        return []

    async def _read_piece(self, block: int, offset: int, length: int) -> Piece:
        """A block that is present, but whose checksum another process has cleared."""
        data = await trio.to_thread.run_sync(
            self._fetch_service.read_bytes, self._object_fetch, offset, length
        )
        return Piece(block, await trio.to_thread.run_sync(_checksum_of, data), length, data=data)

    def close(self) -> None:
        """Cancel the waiter and give everything back; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            if self._waiter is not None:
                self._fetch_service.cancel_waiter(self._waiter)
            self._outgoing.settle(self._unsent_bytes)
            self._on_closed()
            self._fetch_service.release_fetch(self._object_fetch)


def _checksum_of(data: bytes) -> int:
    digest = xxhash.xxh3_64()
    digest.update(data)
    return block_checksum(digest)
