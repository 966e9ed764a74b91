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

from fusecache.blocks import block_bytes
from fusecache.cluster import choice
from fusecache.cluster.exchange import Exchange, Members
from fusecache.cluster.orders import SharedOrders
from fusecache.errors import AttestationError, FusecacheError
from fusecache.loader.load import ObjectLoad
from fusecache.loader.loader import Loader
from fusecache.loader.waiters import Waiter
from fusecache.peers.member import Health, Member
from fusecache.peers.server import Offer, Piece
from fusecache.peers.wire import BlockRequest, RequestError
from fusecache.store.interface import BlockStore
from fusecache.store.paths import is_slower
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_KEPT = 10.0
"""Seconds that a load stays open after it was asked for."""
_PATIENCE = 5.0
"""Seconds without a sign that they are coming after which blocks that are not ours to fetch are no longer waited for:
whoever gives them to us may be waiting for whom we keep waiting."""
_SIGN = 2.0
"""Seconds after which a caller that still waits is told that it may."""
_QUEUE = 15.0
"""Most seconds in the queue for a stream; a caller that can wait longer is told to ask again. Callers do not wait
longer than 20 for any sign of life."""
_RUN = 2 << 20
"""Bytes sent at a time."""


class Holdings:
    """See fusecache.peers.server.Node. `sources`: identity of an origin -> name of its source."""

    def __init__(
        self,
        health: Callable[[], Health],
        members: Members,
        exchange: Exchange,
        loader: Loader,
        store: BlockStore,
        sources: Mapping[str, str],
        *,
        streams: int,
        metrics: Callable[[], str],
        orders: SharedOrders | None = None,
    ) -> None:
        self.sending = 0
        """Answers under way."""
        self.waiting = 0
        """Requests that wait for their turn."""
        self.refused = 0
        """Requests answered 503 since the start."""
        self.owed = 0
        """Bytes promised to others, and not sent yet."""
        self._health = health
        self._members = members
        self._exchange = exchange
        exchange.owed = lambda: self.owed
        self._loader = loader
        self._store = store
        self._sources = sources
        self._metrics = metrics
        self._orders = orders
        self._streams = trio.Semaphore(streams)
        self._name = health().name
        self._spread = choice.Spread(self._name)
        self._listed: tuple[Member, ...] = ()
        self._urls: dict[str, str] = {}
        self._kept: dict[ObjectId, tuple[ObjectLoad, float]] = {}

    async def run(self) -> None:
        """Close loads that nobody asked for lately; until cancelled, then all of them."""
        try:
            while True:
                await trio.sleep(_KEPT / 4)
                limit = time.monotonic() - _KEPT
                old = [object_id for object_id, (_, used) in self._kept.items() if used < limit]
                for load in [self._kept.pop(object_id)[0] for object_id in old]:
                    await trio.to_thread.run_sync(self._loader.release, load)
        finally:
            kept, self._kept = self._kept, {}
            for load, _ in kept.values():
                self._loader.release(load)

    # -- what a server asks

    def health(self) -> Health:
        """See Node."""
        return self._health()

    def metrics(self) -> str:
        """See Node."""
        return self._metrics()

    def coverage(self) -> list[dict[str, Any]]:
        """See Node."""
        slow = is_slower(self._store.paces().read, self._exchange.pace())
        return [
            {
                "id": info.id,
                "source": info.version.origin,
                "key": info.version.key,
                "size": info.version.size,
                "cached_bytes": info.present_bytes,
                "quick": info.in_memory or not slow,
            }
            for info in self._store.objects()
        ]

    def order(self, name: str, node: str, have: bool) -> bytes | None:
        """See Node."""
        if self._orders is None:
            return None
        data = self._orders.given(name)
        if data is None and have:
            self._orders.offered(name, node)
        return data

    def sent(self, node: str, nbytes: int) -> None:
        """See Node."""
        self._exchange.sent(node, nbytes)

    async def offer(self, request: BlockRequest) -> Offer:
        """See Node."""
        if self._members.is_alive(request.node):
            self._members.heard(request.node)
        if request.block_size not in (None, self._store.block_size):
            raise RequestError(409, f"the blocks here have {self._store.block_size} bytes")
        version = request.version or self._store.version_of(request.object_id)
        if version is None:
            raise RequestError(404, "nothing of this object is here")
        source = self._sources.get(version.origin)
        if source is None:
            raise RequestError(404, "this node does not serve the object's source")
        load = await self._load(version, source)
        handed_over = False
        try:
            offer = await self._consider(load, request)
            handed_over = True
            return offer
        finally:
            if not handed_over:
                await trio.to_thread.run_sync(self._loader.release, load)

    def _open(self, version: ObjectVersion, source: str) -> ObjectLoad:
        """Who is asked gives what it has, be it from a slow disk: it has asked nobody else for it yet."""
        with self._store.in_place(version):
            return self._loader.open(version, source)

    async def _load(self, version: ObjectVersion, source: str) -> ObjectLoad:
        """Opened once more."""
        kept = self._kept.get(version.id)
        if kept is not None and self._loader.again(kept[0]):
            self._kept[version.id] = kept[0], time.monotonic()
            return kept[0]
        try:
            load = await trio.to_thread.run_sync(self._open, version, source)
        except FusecacheError as error:
            raise RequestError(503, str(error), {"Retry-After": "1"}) from None
        if self._loader.again(load):
            before = self._kept.get(version.id)
            self._kept[version.id] = load, time.monotonic()
            if before is not None:
                await trio.to_thread.run_sync(self._loader.release, before[0])
        return load

    async def _consider(self, load: ObjectLoad, request: BlockRequest) -> Offer:
        stored = load.stored
        blocks = request.blocks
        if blocks.stop > stored.block_count:
            raise RequestError(400, f"the object has {stored.block_count} blocks")
        if isinstance(load.gone, AttestationError):
            raise RequestError(404, "these bytes are in quarantine: they are not what their manifest says")
        if load.gone is not None:
            raise RequestError(410, "the origin has another version of the object")
        stripe = self._exchange.stripe_of(blocks.start, stored.block_size)
        order = self._exchange.ranking(load.version.id, stripe)
        ours = choice.is_ours(order, self._name, request.failed)
        if not all(stored.present(block) or stored.unverified(block) for block in blocks):
            missed = RequestError(404, "not all of these blocks are stored here")
            if request.stored_only:
                raise missed
            members = len(self._members.members())
            fetches = choice.fetches(order, self._name, request.failed, request.hops, members)
            from_who_asks = request.node in self._exchange.upstream(load.version.id, stripe)
            if from_who_asks or not (fetches or self._loader.coming(load, blocks)):
                owner = order[0].name if order else ""
                raise RequestError(421, f"these blocks are for node {owner} to fetch", owner=owner)
        self._redirect(request, (load.version.id, stripe))
        await self._turn(request)
        certain = functools.partial(self._certain, load.version.id, stripe, ours)
        return _Offer(self, self._loader, load, request, certain)

    def _certain(self, object_id: ObjectId, stripe: int, ours: bool) -> float:
        """When it was last certain that blocks of a stripe come to us, as time.monotonic(). `ours`: we are the one to
        fetch it. But as long as we ask others for it (we were sent on to one before its owner died, or stand in for a
        slow one), they may be waiting for whom we keep waiting."""
        if ours and not self._exchange.upstream(object_id, stripe):
            return time.monotonic()
        return self._exchange.coming(object_id, stripe)

    def _redirect(self, request: BlockRequest, stripe: tuple[ObjectId, int]) -> None:
        """Send a caller on to another holder, if it is that one's turn. Raises RequestError 307."""
        if request.stored_only or not request.node:
            return
        members = self._members.members()
        if members is not self._listed:
            self._listed, self._urls = members, {member.name: member.url for member in members}
        direct = request.direct or request.hops > 0
        self._spread.told(request.node, request.owed)
        self._exchange.paces.told(request.node, request.pace)
        self._spread.told(self._name, self.owed)
        nbytes = len(request.blocks) * self._store.block_size
        usable = choice.Others(self._urls, (request.node, *request.failed))
        found = self._spread.parent(stripe, request.node, usable, nbytes, direct=direct)
        if found != self._name:
            raise RequestError(
                307, f"node {found} has them, too", {"Location": self._urls[found] + request.target}
            )

    async def _turn(self, request: BlockRequest) -> None:
        self.waiting += 1
        try:
            with trio.move_on_after(min(_QUEUE, request.deadline / 2)) as scope:
                await self._streams.acquire()
        finally:
            self.waiting -= 1
        if scope.cancelled_caught:
            self.refused += 1
            raise RequestError(503, "too much to do: ask again", {"Retry-After": "1"})
        self.sending += 1

    def ended(self, load: ObjectLoad, unsent: int) -> None:
        """An offer was closed, `unsent` bytes of it were not sent."""
        self.owed -= unsent
        self.sending -= 1
        self._streams.release()
        self._loader.release(load)


class _Offer:
    """See fusecache.peers.server.Offer."""

    def __init__(
        self,
        holdings: Holdings,
        loader: Loader,
        load: ObjectLoad,
        request: BlockRequest,
        coming: Callable[[], float],
    ) -> None:
        """`coming` tells when it was last certain that the blocks come to us, as time.monotonic()."""
        stored = load.stored
        self.lengths: Sequence[int] = [
            block_bytes(block, load.version.size, stored.block_size) for block in request.blocks
        ]
        self._unsent = sum(self.lengths)
        holdings.owed += self._unsent
        self.stored = all(stored.present(block) for block in request.blocks)
        self._holdings = holdings
        self._loader = loader
        self._load = load
        self._blocks = request.blocks
        self._at = 0
        self._given = 0
        self._coming = coming
        self._since = time.monotonic()
        """When the last blocks were there."""
        self._urgent = request.urgent
        self._deadline = trio.current_time() + request.deadline
        self._waiter: Waiter | None = None
        self._landed = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._closed = False

    async def next(self) -> list[Piece] | float:
        """See Offer."""
        self._count_sent()
        pieces = self._present() if self._waiter is None else []
        while not pieces:
            found = await self._wait()
            if isinstance(found, float):
                return found
            pieces = found
        self._since = time.monotonic()
        self._at += len(pieces)
        self._given = sum(piece.length for piece in pieces)
        return pieces

    def _count_sent(self) -> None:
        self._holdings.owed -= self._given
        self._unsent -= self._given
        self._given = 0

    def _present(self) -> list[Piece]:
        stored, pieces, total = self._load.stored, [], 0
        for at in range(self._at, len(self._blocks)):
            block = self._blocks[at]
            checksum = stored.checksum(block)
            if not stored.present(block) or not checksum or total > _RUN:
                break
            length = self.lengths[at]
            pieces.append(Piece(block, checksum, length, stored.fileno(), block * stored.block_size))
            total += length
        return pieces

    async def _wait(self) -> list[Piece] | float:
        block, length = self._blocks[self._at], self.lengths[self._at]
        if self._waiter is None and (found := await self._ask(block, length)):
            return found
        assert self._waiter is not None
        with trio.move_on_at(min(self._deadline, trio.current_time() + _SIGN)) as scope:
            await self._landed.wait()
        if scope.cancelled_caught and not self._landed.is_set():
            if trio.current_time() >= self._deadline:
                raise trio.TooSlowError
            return self._age()
        waiter, self._waiter = self._waiter, None
        if waiter.error is not None:
            raise waiter.error
        if block in waiter.pieces:
            data = waiter.pieces[block]
            return [Piece(block, await trio.to_thread.run_sync(_digest, data), length, data=data)]
        return self._present()

    def _age(self) -> float:
        """Seconds since it was certain that there is reason to wait. Raises trio.TooSlowError when that is long ago."""
        certain = max(self._coming(), self._since)
        age = time.monotonic() - certain
        if age > _PATIENCE:
            raise trio.TooSlowError
        return age

    async def _ask(self, block: int, length: int) -> list[Piece]:
        """Have a block brought; what is there already is returned."""
        landed = self._landed = trio.Event()

        def settled(_waiter: Waiter) -> None:
            try:
                self._token.run_sync_soon(landed.set)
            except trio.RunFinishedError:
                _log.debug("a block landed for a server that has ended")

        offset = block * self._load.stored.block_size
        waiter = self._loader.request(self._load, offset, length, settled, whole=False, urgent=self._urgent)
        if waiter is None:
            pieces = self._present()
            return pieces or [await self._copied(block, offset, length)]
        self._waiter = waiter
        return []

    async def _copied(self, block: int, offset: int, length: int) -> Piece:
        """A present block whose checksum another process has cleared."""
        data = await trio.to_thread.run_sync(self._loader.read, self._load, offset, length)
        return Piece(block, await trio.to_thread.run_sync(_digest, data), length, data=data)

    def close(self) -> None:
        """See Offer."""
        if not self._closed:
            self._closed = True
            if self._waiter is not None:
                self._loader.cancel(self._waiter)
            self._holdings.ended(self._load, self._unsent)


def _digest(data: bytes) -> int:
    digest = xxhash.xxh3_64()
    digest.update(data)
    return digest.intdigest() or 1
