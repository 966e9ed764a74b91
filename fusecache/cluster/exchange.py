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
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fusecache.cluster import choice
from fusecache.cluster.watch import Flight, Watch
from fusecache.errors import CancelledReadError, UnavailableError
from fusecache.loader.interface import Again, Expect, Route
from fusecache.origin.slots import Slots
from fusecache.peers.breaker import Breakers
from fusecache.peers.client import PeerClient
from fusecache.peers.errors import (
    PeerBusyError,
    PeerElsewhereError,
    PeerError,
    PeerMissError,
    PeerRefusedError,
    PeerSilentError,
)
from fusecache.peers.member import Member
from fusecache.peers.placement import ranking
from fusecache.peers.wire import BlockRequest
from fusecache.store.pace import Best
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from fusecache.origin.base import Origin

_log = logging.getLogger(__name__)

Items = Generator["Buffer | Expect | Again", None, None]

_EMPTY_HANDED = 10.0
"""Seconds for which a node that had nothing of an object is not asked again whether it has."""
_SILENCE = 20.0
"""Seconds without a byte, or word that the node waits itself, after which one that is alive is passed over all the
same."""
_AT_RANDOM = 2
_LOOK_ELSEWHERE = 0.5
"""Seconds between looks, of all flights together, at whether other nodes have what is waited for. When each flight
looked every second, the last ten seconds of 16 nodes in the lab went into questions."""
_RANKINGS = 10_000
"""Kept at a time, as long as the members stay the same."""


class Members(Protocol):
    """What is asked of the membership; from any thread."""

    def members(self) -> tuple[Member, ...]:
        """The nodes that are alive, this one among them if it serves."""
        ...

    def is_alive(self, name: str) -> bool:
        """Whether this node is one of them."""
        ...

    def heard(self, name: str) -> None:
        """It sent bytes just now."""
        ...

    def suspect(self, name: str) -> None:
        """It did not answer: have a look at it."""
        ...


@dataclass
class PeerTraffic:
    """Counters of one node since the start. Guarded by the Exchange's lock."""

    bytes_in: int = 0
    bytes_out: int = 0
    requests: int = 0
    errors: int = 0
    bad_blocks: int = 0
    first_byte: float | None = None
    """Seconds until an answer begins, the mean of the last ones."""


@dataclass
class ExchangeStats:
    """Counters since the start. Guarded by the Exchange's lock."""

    bytes_peers: int = 0
    fallbacks: int = 0
    """Flights that went to the origin though the stripe is another node's."""
    redirected: int = 0
    busy: int = 0
    hedged: int = 0
    peers: dict[str, PeerTraffic] = field(default_factory=dict)


class _HedgedError(Exception):
    """A second request was answered while the first was slow."""

    def __init__(
        self,
        member: Member,
        answer: Iterator[int | memoryview],
        close: Callable[[], None],
        *,
        slow: bool,
    ) -> None:
        super().__init__(member.name)
        self.slow = slow
        self.member = member
        self.answer = answer
        self.close = close


class Exchange:
    """The supplier of a node in a cluster; see loader.Supplier. Thread-safe."""

    def __init__(
        self,
        name: str,
        members: Members,
        client: PeerClient,
        origins: Mapping[str, Origin],
        *,
        stripe: int,
        crew: int,
        concurrency: int,
        fallback: int,
        keep: bool = True,
    ) -> None:
        self.crew = crew
        self.stats = ExchangeStats()
        self.breakers = Breakers()
        self._pace = Best()
        self.owed: Callable[[], int] = lambda: 0
        """Bytes promised to others, and not sent yet."""
        self.paces = choice.Paces()
        self._name = name
        self._members = members
        self._client = client
        self._origins = origins
        self._stripe = stripe
        self._keep = keep
        self._lock = threading.Lock()
        self._receiving = 0
        self._elsewhere = 0.0
        """When a flight may look elsewhere again."""
        self._empty: dict[tuple[str, ObjectId], float] = {}
        self._upstream: dict[tuple[ObjectId, int], list[str]] = {}
        self._coming: dict[tuple[ObjectId, int], float] = {}
        self._ranked: tuple[Member, ...] = ()
        self._rankings: dict[tuple[ObjectId, int], list[Member]] = {}
        self._own = Slots(lambda: choice.origin_slots(concurrency, len(members.members())))
        self._foreign = Slots(lambda: choice.fallback_slots(fallback, len(members.members())))

    @property
    def receiving(self) -> int:
        """Answers of other nodes under way."""
        return self._receiving

    def traffic(self, name: str) -> PeerTraffic:
        """The counters of a node, to be read."""
        with self._lock:
            return self.stats.peers.setdefault(name, PeerTraffic())

    def sent(self, name: str, nbytes: int) -> None:
        """So many bytes went to a node."""
        with self._lock:
            self.stats.peers.setdefault(name, PeerTraffic()).bytes_out += nbytes

    def pace(self) -> float | None:
        """Bytes per second that the other nodes gave in their best second of late; None: nothing is known."""
        with self._lock:
            return self._pace.per_second(time.monotonic())

    def abreast(self) -> int:
        """See loader.Supplier."""
        return self.paces.abreast(self.pace(), self.crew)

    def took(self, nbytes: int) -> None:
        """So many bytes came, and are not kept."""
        with self._lock:
            self._pace.add(time.monotonic(), nbytes)

    def route(self, version: ObjectVersion, block_size: int) -> Route | None:
        """See loader.Supplier."""
        members = self._members.members()
        return choice.route_of(version, block_size, self._stripe, members, self._name, keep=self._keep)

    def stripe_of(self, block: int, block_size: int) -> int:
        """Number of the stripe that holds a block."""
        return block // max(1, self._stripe // block_size)

    def upstream(self, object_id: ObjectId, stripe: int) -> Collection[str]:
        """The nodes from which blocks of this stripe are to come, who may not have them yet."""
        return self._upstream.get((object_id, stripe), ())

    def _depend(self, stripe: tuple[ObjectId, int], name: str) -> None:
        with self._lock:
            self._upstream.setdefault(stripe, []).append(name)

    def _independent(self, stripe: tuple[ObjectId, int], name: str) -> None:
        with self._lock:
            names = self._upstream[stripe]
            names.remove(name)
            if not names:
                del self._upstream[stripe]

    def note_coming(self, flight: Flight, when: float) -> None:
        """At that time it was certain that what is left of a flight comes to us."""
        self._coming[flight.version.id, self.stripe_of(flight.at, flight.block_size)] = when

    def coming(self, object_id: ObjectId, stripe: int) -> float:
        """When it was last certain that blocks of this stripe come to us, as time.monotonic()."""
        return self._coming.get((object_id, stripe), 0.0)

    def ranking(self, object_id: ObjectId, stripe: int) -> list[Member]:
        """The nodes for one stripe, the owner first."""
        members = self._members.members()
        with self._lock:
            if members is not self._ranked:
                self._ranked = members
                self._rankings = {}
            found = self._rankings.get((object_id, stripe))
        if found is None:
            # all nodes ask the owner for the same stripe: 2 ms each in a cluster of 10,000
            found = ranking(object_id, stripe, members, choice.ranked(len(members)))
            with self._lock:
                if members is self._ranked:
                    self._rankings[object_id, stripe] = found
                while len(self._rankings) > _RANKINGS:
                    del self._rankings[next(iter(self._rankings))]
        return found

    # -- the loader's side

    def supply(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> Items:
        """See loader.Supplier."""
        flight = Flight(version, blocks, block_size, deadline, cancelled, blocks.start, urgent=urgent)
        order = self.ranking(version.id, self.stripe_of(blocks.start, block_size))
        may_have = functools.partial(self._may_have, version.id)
        members = len(self._members.members())
        for turn in choice.turns(order, self._name, flight.failed, self.breakers.allowed, may_have, members):
            if turn.member is None:
                yield from self._from_origin(flight, source, turn.owner)
                return
            flight.may_hedge = turn.behind
            yield from self._ask(flight, turn.member, turn.stored_only)
            if not flight.left:
                return

    def _from_origin(self, flight: Flight, source: str, owner: bool) -> Items:
        if not owner:
            with self._lock:
                self.stats.fallbacks += 1
        slots = self._own if owner else self._foreign
        with slots.hold(time.monotonic, flight.deadline, flight.cancelled):
            offset = flight.at * flight.block_size
            length = min(flight.blocks.stop * flight.block_size, flight.version.size) - offset
            yield from self._origins[source].read(
                flight.version, offset, length, deadline=flight.deadline, cancelled=flight.cancelled
            )

    def _may_have(self, object_id: ObjectId, member: Member) -> bool:
        with self._lock:
            since = self._empty.get((member.name, object_id))
        return since is None or time.monotonic() - since > _EMPTY_HANDED

    # -- one node

    def _ask(self, flight: Flight, member: Member, stored_only: bool = False) -> Items:
        """What this node gives of what is left, which may be nothing. Raises CancelledReadError, UnavailableError."""
        asking = choice.Asking(member, member)
        silent: set[str] = set()
        while True:
            self._check(flight)
            target = asking.target
            try:
                yield from self._stream(
                    flight, target, stored_only=stored_only, direct=asking.direct, hops=asking.hops
                )
                return
            except PeerBusyError as busy:
                with self._lock:
                    self.stats.busy += 1
                self.breakers.undecided(target.name)
                self._wait(flight, busy.retry_after)
                continue
            except PeerElsewhereError as elsewhere:
                self.breakers.succeeded(target.name)
                if asking.send_on(self._member_at(elsewhere.url), self._name):
                    with self._lock:
                        self.stats.redirected += 1
                continue
            except PeerMissError:
                self.breakers.undecided(target.name)
                if stored_only:
                    with self._lock:
                        while len(self._empty) > 10_000:
                            del self._empty[next(iter(self._empty))]
                        self._empty[target.name, flight.version.id] = time.monotonic()
            except PeerError as error:
                if isinstance(error, PeerSilentError) and self._try_again(target, silent):
                    continue
                self._blame(target, error, redirected=asking.sent_on)
            if flight.begun:
                flight.begun = False
                yield Again()
            if asking.sent_on:
                asking.back()
                continue
            if not stored_only and member.name not in flight.failed:
                flight.failed.append(member.name)
            return

    def _try_again(self, member: Member, silent: set[str]) -> bool:
        """Whether to connect to a node once more. Where many send at once a connection's first packets get lost, and
        that is no reason to ask the origin. A node that is gone is known to be by then."""
        self._members.suspect(member.name)
        if member.name in silent or not self._members.is_alive(member.name):
            return False
        silent.add(member.name)
        self.breakers.undecided(member.name)
        return True

    def _blame(self, member: Member, error: PeerError, *, redirected: bool) -> None:
        self._members.suspect(member.name)
        if redirected:
            # it passed on what it got itself, and may have lost that: its fault shows when it is asked directly
            self.breakers.undecided(member.name)
            return
        with self._lock:
            self.stats.peers.setdefault(member.name, PeerTraffic()).errors += 1
        if self.breakers.state(member.name)[0] != str(error):
            log = _log.warning if isinstance(error, PeerRefusedError) else _log.info
            log("node %s did not give its blocks: %s", member.name, error)
        self.breakers.failed(member.name, str(error))

    def _member_at(self, url: str) -> Member | None:
        for member in self._members.members():
            if url == member.url or url.startswith(member.url + "/"):
                return member
        return None

    def _check(self, flight: Flight) -> None:
        if flight.cancelled():
            raise CancelledReadError(f"{flight.version.key}: the reader went away")
        if time.monotonic() >= flight.deadline:
            raise UnavailableError(f"{flight.version.key}: not all bytes came before the deadline")

    def _wait(self, flight: Flight, seconds: float) -> None:
        until = time.monotonic() + seconds
        pause = threading.Event()
        while (left := until - time.monotonic()) > 0:
            pause.wait(min(left, 0.25))
            self._check(flight)

    def _request(self, flight: Flight, *, stored_only: bool, direct: bool, hops: int) -> BlockRequest:
        return BlockRequest(
            flight.version.id,
            flight.left,
            flight.version,
            flight.block_size,
            max(0.001, min(120.0, flight.deadline - time.monotonic())),
            hops,
            stored_only,
            tuple(flight.failed),
            direct,
            urgent=flight.urgent,
            owed=self.owed(),
            pace=round(self.pace() or 0),
            node=self._name,
        )

    def _stream(self, flight: Flight, member: Member, *, stored_only: bool, direct: bool, hops: int) -> Items:
        request = self._request(flight, stored_only=stored_only, direct=direct, hops=hops)
        stripe = (flight.version.id, self.stripe_of(flight.at, flight.block_size))
        watch = Watch(self, flight, member, may_hedge=not stored_only)
        waits_for = None if stored_only else member.name
        if waits_for is not None:
            self._depend(stripe, waits_for)
        with self._lock:
            self._receiving += 1
            self.stats.peers.setdefault(member.name, PeerTraffic()).requests += 1
        try:
            items: Iterator[int | memoryview] | None = None
            close: Callable[[], None] = _nothing
            while True:
                try:
                    with contextlib.ExitStack() as stack:
                        if items is None:
                            began = time.monotonic()
                            answer = self._client.blocks(member.url, request, flight.version.size, watch)
                            self._answered(member, time.monotonic() - began)
                            items, close = iter(answer), answer.close
                            watch.stored = answer.stored
                        stack.callback(close)
                        yield from self._deliver(flight, items, watch)
                    self.breakers.succeeded(watch.member.name)
                    return
                except _HedgedError as hedged:
                    if hedged.slow:
                        self.breakers.too_slow(watch.member.name)
                        _log.info("node %s is slow: %s goes on", watch.member.name, hedged.member.name)
                    if flight.begun:
                        flight.begun = False
                        yield Again()
                    watch.switch(hedged.member)
                    items, close = hedged.answer, hedged.close
                    if waits_for is not None:
                        self._independent(stripe, waits_for)
                    waits_for = hedged.member.name if hedged.slow else None
        finally:
            watch.tell()
            if waits_for is not None:
                self._independent(stripe, waits_for)
            with self._lock:
                self._receiving -= 1
                self._coming.pop(stripe, None)

    def _answered(self, member: Member, seconds: float) -> None:
        self._members.heard(member.name)
        with self._lock:
            traffic = self.stats.peers.setdefault(member.name, PeerTraffic())
            known = traffic.first_byte
            traffic.first_byte = seconds if known is None else 0.8 * known + 0.2 * seconds

    def _deliver(self, flight: Flight, items: Iterator[int | memoryview], watch: Watch) -> Items:
        expected: Expect | None = None
        left = 0
        for item in items:
            if isinstance(item, int):
                expected = Expect(item)
                left = min(flight.block_size, flight.version.size - flight.at * flight.block_size)
                yield expected
                continue
            assert expected is not None
            flight.begun = True
            left -= len(item)
            watch.nbytes += len(item)
            yield item
            if left:
                continue
            flight.begun = False
            if expected.bad:
                self._wrong_bytes(watch.member, flight)
                raise PeerError(f"{watch.member.url}: sent wrong bytes")
            flight.at += 1
            watch.landed()

    def _wrong_bytes(self, member: Member, flight: Flight) -> None:
        self.breakers.sent_wrong_bytes(member.name)
        with self._lock:
            self.stats.peers.setdefault(member.name, PeerTraffic()).bad_blocks += 1
        _log.warning(
            "node %s (%s) sent wrong bytes for block %d of %s: it is avoided; check its memory and disk",
            member.name,
            member.url,
            flight.at,
            flight.version.key,
        )

    def count(self, member: Member, nbytes: int, seconds: float, *, stored: bool) -> None:
        """So many bytes came from a node, and took so long."""
        self.breakers.measured(member.name, nbytes, seconds, stored=stored)
        if nbytes:
            self._members.heard(member.name)
            with self._lock:
                self.stats.bytes_peers += nbytes
                self._pace.add(time.monotonic(), nbytes)
                self.stats.peers.setdefault(member.name, PeerTraffic()).bytes_in += nbytes

    def look_around(self, flight: Flight, member: Member, silent: float) -> None:
        """While nothing comes from a node. Raises PeerError when it is not worth waiting for, or what ends a flight."""
        self._check(flight)
        if not self._members.is_alive(member.name):
            raise PeerError(f"{member.url}: the node is not alive")
        if silent > _SILENCE:
            raise PeerError(f"{member.url}: nothing came for {_SILENCE:g} s")

    @property
    def idle(self) -> bool:
        """Whether most of the crew has nothing to do: what is under way is the last there is."""
        return self._receiving < self.crew // 8

    def hedge(self, flight: Flight, now_from: Member, *, stored_only: bool) -> None:
        """Ask another node for what is left, too: any that has it stored, or the next in order, which then fetches it.
        While that one is waited for it gets nothing of this from us, or both would wait until the deadline. Raises
        _HedgedError if it has an answer."""
        if stored_only:
            with self._lock:
                now = time.monotonic()
                if now < self._elsewhere:
                    return
                self._elsewhere = now + _LOOK_ELSEWHERE
            others = [
                member
                for member in self._members.members()
                if member.name not in (self._name, now_from.name, *flight.failed)
            ]
            asked = random.sample(others, min(len(others), _AT_RANDOM))
        else:
            asked = [member for member in flight.may_hedge if member.name != now_from.name]
        for member in asked:
            if not self.breakers.allowed(member.name):
                continue
            again = Flight(
                flight.version,
                flight.blocks,
                flight.block_size,
                flight.deadline,
                flight.cancelled,
                flight.at,
                urgent=flight.urgent,
                failed=list(flight.failed) if stored_only else [*flight.failed, now_from.name],
            )
            request = self._request(again, stored_only=stored_only, direct=True, hops=0)
            watch = Watch(self, again, member, may_hedge=False)
            stripe = (flight.version.id, self.stripe_of(flight.at, flight.block_size))
            if not stored_only:
                self._depend(stripe, member.name)  # the flight goes on with that if it has an answer
            try:
                answer = self._client.blocks(member.url, request, flight.version.size, watch)
            except BaseException as error:
                if not stored_only:
                    self._independent(stripe, member.name)
                if not isinstance(error, PeerError):
                    raise
                _log.debug("node %s instead of %s: %s", member.name, now_from.name, error)
                self.breakers.undecided(member.name)
                continue
            with self._lock:
                self.stats.hedged += 1
            raise _HedgedError(member, iter(answer), answer.close, slow=not stored_only)


def _nothing() -> None:
    """There is nothing to close yet."""
