"""Whom a node asks for a stripe, and what an asked node does: the rules of the exchange, without I/O. The simulation in
benchmarks/ runs these, too."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass

from fusecache.loader.interface import Route
from fusecache.peers.member import Member, seed_of
from fusecache.peers.placement import fetch_order, owners, stripe_count
from fusecache.types import ObjectId, ObjectVersion

FAILURES = 3
"""Nodes that did not answer, after which a stripe comes from the origin."""
RANKED = 16
"""Of a ranking, as far as anybody looks in a cluster without deputies."""
ASKED_FIRST = 2
"""Nodes next in order that an owner asks whether they have a stripe before it goes to the origin: after a node came,
the one that had the stripe before is the next."""
ORIGIN_REQUESTS = 64
"""To the origin at a time, of all nodes together: enough for a NIC's worth of slow connections. Few at a time, so that
stripes come in one after the other and the others need not hold one request per stripe."""
FAN_OUT = 16
"""Nodes that one node sends one stripe to, as long as others may send it, too."""
ROOM = 2.0
"""Requests to other nodes at a time, over those that are enough for a link when all links are alike. A node with a
tenth of the others' bandwidth, whose 48 requests for itself shared its link with the stripes that the others waited
for, held up a cluster of 100 to 2.5 times the time."""
LEAST_CREW = 4
"""Requests at a time that even the slowest link has."""
PACES_KEPT = 32
"""Requests whose senders' paces are known: of some seconds, and their median takes 10 us."""
NODES_KEPT = 20_000
"""Nodes whose own paces are known."""
PACE_OF_ITS_OWN = 4
"""Times that a node receives more slowly than what is usual, from which on it is its link that is slow."""
PACES_SURE = 8
"""Of those, as many as it takes to say what is usual."""
DIRECT = 128
"""Nodes of the largest cluster in which all ask the owner of a stripe. Each request takes a node about 0.6 ms: 10,000
nodes that asked one owner would wait 6 s for the last of them, most without a connection."""
TOGETHER = ORIGIN_REQUESTS // 2
"""Owners that fetch from the origin at the same time, in a larger cluster one group of them after the other. A node
follows no more stripes than it has threads: when 100 owners fetched two each, all threads of all nodes were held by
stripes that came a drop at a time, and the links were four fifths idle until the origin was done."""
BEHIND = 4
"""Requests' worth of bytes that a node may have promised more than another holder before it sends callers on to that
one: each detour costs a round trip and some CPU. In the lab of 16 nodes 2 sent on every second request, 4 two fifths,
in the same time (1.18 to 1.28 times the bound, with the CPUs busy). From 8 on 100 simulated nodes take longer."""
WINDOW = 3
"""Stripes of one owner that a node asks for ahead at a time: the next ones have to be asked for before the first is
through, and more do not come sooner. In a lab of 8 nodes that asked for 64 stripes at a time, whoever was late with
its plan got a third of what the others got, and every queue was full of what nobody needed yet."""
DEPTH = 6
"""Nodes that a stripe passes through between its owner and whoever asks."""
LOOKED_AT = 16
"""Holders of a stripe, of those whose turn it is, that are compared to find the one that sends it to the next node: a
choice among all took 50 us with 1,000 nodes and 160 us with 4,000; this one takes 4."""


def route_of(
    version: ObjectVersion,
    block_size: int,
    stripe: int,
    members: Sequence[Member],
    me: str,
    *,
    keep: bool = True,
    owners: Callable[[ObjectId, int, Sequence[Member]], Sequence[int]] = owners,
) -> Route | None:
    """Where the stripes of an object come from; None: there are no others. `keep`: see Route, `owners`: placement."""
    if not any(member.name != me for member in members):
        return None
    blocks = max(1, stripe // block_size)
    count = stripe_count(version.size, blocks * block_size)
    owned_by = owners(version.id, count, members)
    names = [member.name for member in members]
    mine = names.index(me) if me in names else len([name for name in names if name < me]) % len(names)
    return Route(
        blocks,
        bytes(names[owner] != me for owner in owned_by),
        fetch_order(owned_by, len(members), mine, TOGETHER),
        keep,
        [names[owner] for owner in owned_by],
        WINDOW,
        keep and len(members) > TOGETHER,
        len({owner for owner in owned_by if names[owner] != me}),
    )


def deputies(members: int) -> int:
    """How many nodes, those next in a stripe's ranking, stand between its owner and the others in a cluster of so many.
    The owner has to do with no more nodes than each of them, at best with the root of all; 0: all ask the owner."""
    return math.isqrt(members) if members > DIRECT else 0


def ranked(members: int) -> int:
    """How many of a stripe's ranking anybody looks at in a cluster of so many."""
    return max(RANKED, deputies(members) + 1)


def is_deputy(order: Sequence[Member], me: str, members: int) -> bool:
    """Whether others ask us for a stripe of this ranking instead of its owner."""
    return any(member.name == me for member in order[1 : deputies(members) + 1])


def ask_order(
    order: Sequence[Member], me: str, allowed: Callable[[str], bool], members: int
) -> tuple[list[Member], list[str]]:
    """Who is asked for a stripe with this ranking, one after the other, and who was passed over: those ahead of us, in
    a large cluster two deputies before them. Whoever asks only ever asks who is further ahead."""
    most = deputies(members)
    wanted = list(order[:FAILURES])
    if most and not any(member.name == me for member in order[: most + 1]):
        place = seed_of(me)
        between = order[1 : most + 1]
        wanted = [between[(place + turn) % len(between)] for turn in range(min(2, len(between)))] + wanted
    asked: list[Member] = []
    passed: list[str] = []
    for member in dict.fromkeys(wanted):
        if member.name == me:
            break
        if allowed(member.name):
            asked.append(member)
        else:
            passed.append(member.name)
    return asked, passed


def heirs(order: Sequence[Member], me: str) -> list[Member]:
    """Who may have a stripe of this ranking stored, though we are the one to fetch it."""
    return [member for member in order[: ASKED_FIRST + 1] if member.name != me][:ASKED_FIRST]


def is_ours(order: Sequence[Member], me: str, failed: Collection[str]) -> bool:
    """Whether we are the one to bring a stripe of this ranking, when those nodes did not answer who asks."""
    for member in order:
        if member.name == me:
            return True
        if member.name not in failed:
            return False
    return False


def fetches(order: Sequence[Member], me: str, failed: Collection[str], hops: int, members: int) -> bool:
    """Whether we bring a stripe that is not here for who asks. Whoever was sent on to us by another node goes back to
    that one instead: it must be somebody's only."""
    return (is_ours(order, me, failed) or is_deputy(order, me, members)) and not (
        hops and order[0].name != me
    )


@dataclass(frozen=True)
class Turn:
    """Where a flight looks next: at this node, or at the origin (None). `stored_only`: it gives what it has, and no
    more. `behind`: the nodes that may stand in for it. `owner`: the stripe is our own."""

    member: Member | None
    stored_only: bool = False
    behind: Sequence[Member] = ()
    owner: bool = False


def turns(
    order: Sequence[Member],
    me: str,
    failed: list[str],
    allowed: Callable[[str], bool],
    may_have: Callable[[Member], bool],
    members: int,
) -> Iterator[Turn]:
    """Where a flight looks for a stripe with this ranking, until it has all of it: the nodes ahead of us; those next in
    order that may have it stored; the origin. Nodes that are passed over, and (by the caller) those that did not
    answer, are put into `failed`. There are so many `members` in the cluster."""
    asked, passed = ask_order(order, me, allowed, members)
    failed += passed
    for number, member in enumerate(asked):
        yield Turn(member, behind=asked[number + 1 :])
    owner = not order or order[0].name == me
    if not owner or len(order) > 1:
        for member in heirs(order, me):
            if may_have(member) and member.name not in failed:
                yield Turn(member, stored_only=True)
    yield Turn(None, owner=owner)


@dataclass
class Asking:
    """A node that is asked for a stripe, and `target`, the one it sent us on to, or itself. Nobody is sent on twice:
    who has nothing to give after all leads back to `member`, which then has to give (`direct`)."""

    member: Member
    target: Member
    direct: bool = False
    hops: int = 0

    @property
    def sent_on(self) -> bool:
        """Whether we were sent to another holder."""
        return self.target is not self.member

    def send_on(self, found: Member | None, me: str) -> bool:
        """We are sent on to `found`, None: nobody we know; returns whether we go there."""
        if found is None or self.direct or found.name == me:
            self.back()
            return False
        self.target, self.hops = found, self.hops + 1
        return True

    def back(self) -> None:
        """Ask `member` itself from now on."""
        self.target, self.direct, self.hops = self.member, True, 0


def origin_slots(concurrency: int, members: int) -> int:
    """Requests to the origin at a time of one of so many nodes, for stripes of its own."""
    return max(2, min(concurrency, -(-ORIGIN_REQUESTS // max(1, members))))


def fallback_slots(budget: int, members: int) -> int:
    """The same for stripes of nodes that don't answer: a share of the cluster's budget, by the nodes alive."""
    return max(1, budget // max(1, members))


class Paces:
    """How fast those that ask us receive, as they say: the last PACES_KEPT of them. One thread tells, any may ask."""

    def __init__(self) -> None:
        self._told: deque[int] = deque(maxlen=PACES_KEPT)
        self._of: OrderedDict[str, int] = OrderedDict()
        self._middle = 0.0

    def told(self, name: str, pace: int) -> None:
        """A node receives so many bytes per second at best; 0: it does not know."""
        if pace:
            self._of[name] = pace
            while len(self._of) > NODES_KEPT:
                self._of.popitem(last=False)
            self._told.append(pace)
            if len(self._told) >= PACES_SURE:
                self._middle = statistics.median(self._told)

    def is_loaded(self, name: str) -> bool:
        """Whether a node that gives little has a link like the others': it only has much to do."""
        return self._of.get(name, 0) * PACE_OF_ITS_OWN > self._middle > 0

    def abreast(self, ours: float | None, crew: int) -> int:
        """Requests at a time, of `crew`, that are enough for our link: fewer where it is much slower than the others',
        so that what they wait for does not have to share it with so much that only we want."""
        if ours is None or not self._middle:
            return crew
        return max(LEAST_CREW, min(crew, round(crew * ROOM * ours / self._middle)))


class Others(Container[str]):
    """All these names but a few: no set of thousands is made for one request."""

    def __init__(self, names: Container[str], without: Container[str]) -> None:
        self._names = names
        self._without = without

    def __contains__(self, name: object) -> bool:
        return name in self._names and name not in self._without


@dataclass
class Holder:
    """A node that has, or gets, one stripe: how many nodes it is away from us, and how many get it from there."""

    depth: int
    children: int = 0


@dataclass
class Holders:
    """All of one stripe, and the names of those that may send it to further nodes, in turn."""

    all: dict[str, Holder]
    able: deque[str]


class Spread:
    """Who passes our stripes on. A node that many ask at once gives each stripe to few of them, and sends the others to
    those: everybody sends about as much as it takes, and no stripe has to wait for one node's link.

    We give a stripe ourselves as long as we are hardly more behind than the others. Then each asking node is given the
    holder with the fewest bytes waiting for room on their way out, as the nodes say of themselves with each request, of
    LOOKED_AT that are compared. Whoever is a holder already and asks again is served by us: a node only ever depends on
    one that came before it, so nobody waits for itself.
    """

    def __init__(self, me: str, stripes: int = 20_000) -> None:
        self._me = me
        self._most = stripes
        self._stripes: OrderedDict[tuple[ObjectId, int], Holders] = OrderedDict()
        self._owed: dict[str, int] = {}

    def told(self, name: str, owed: int) -> None:
        """So many bytes wait at a node for room on their way out."""
        self._owed[name] = owed

    def parent(
        self,
        stripe: tuple[ObjectId, int],
        asking: str,
        usable: Container[str],
        nbytes: int,
        *,
        direct: bool = False,
    ) -> str:
        """The holder that gives these `nbytes` of a stripe to `asking`, which is a holder from now on; our own name: we
        do. `usable` are the others that are alive."""
        holders = self._stripes.get(stripe)
        if holders is None:
            holders = self._stripes[stripe] = Holders({self._me: Holder(0)}, deque())
            while len(self._stripes) > self._most:
                self._stripes.popitem(last=False)
        else:
            self._stripes.move_to_end(stripe)
        if asking in holders.all or direct:
            if asking not in holders.all:
                self._add(holders, asking, 1)
            return self._me
        chosen = self._least(holders, usable)
        ours = self._owed.get(self._me, 0) - BEHIND * nbytes
        mine = holders.all[self._me]
        if chosen is None or (mine.children < FAN_OUT and ours <= self._owed.get(chosen, 0)):
            chosen = self._me
        holder = holders.all[chosen]
        holder.children += 1
        if holder.children == FAN_OUT and chosen != self._me:
            holders.able.remove(chosen)
        self._add(holders, asking, holder.depth + 1)
        self._owed[chosen] = self._owed.get(chosen, 0) + nbytes
        return chosen

    def _add(self, holders: Holders, name: str, depth: int) -> None:
        holders.all[name] = Holder(depth)
        if depth < DEPTH:
            holders.able.append(name)

    def _least(self, holders: Holders, usable: Container[str]) -> str | None:
        """Of the next LOOKED_AT others that are usable, the one that owes least."""
        chosen: str | None = None
        least, looked_at = (0, 0), 0
        for name in holders.able:
            if name not in usable:
                continue
            owed = self._owed.get(name, 0), holders.all[name].depth
            if chosen is None or owed < least:
                chosen, least = name, owed
            looked_at += 1
            if looked_at == LOOKED_AT:
                holders.able.rotate(-LOOKED_AT)
                break
        return chosen
