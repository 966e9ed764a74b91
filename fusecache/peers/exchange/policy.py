"""The rules and timings of the exchange, without I/O: which nodes a node asks for a stripe, and how an asked node
answers. The simulation in benchmarks/ runs them, too.

For each stripe all nodes rank the members in the same order. The first is the stripe's *owner*, which fetches it from
the origin; in a large cluster the next ones are its *sub-owners*, which the others ask in its place. Every node that
gets a stripe is a *holder*, and may send it to further nodes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass

from fusecache.bounded import BoundedDict
from fusecache.fetch.block_source import Route
from fusecache.peers.member import Member, hash_seed
from fusecache.peers.membership.placement import fetch_order, find_stripe_owners, stripe_count
from fusecache.types import ObjectId, ObjectVersion

MAX_SILENCE = 20.0
"""Seconds without a byte, or word that the node waits itself, after which a node that is alive is passed over all the
same."""
NOTICE_EVERY = 2.0
"""Seconds after which a caller that still waits is told that there is reason to wait."""
NOTICE_WITHIN = 3.0
"""Seconds within which a node that waits itself says so; a longer silence is its own slowness."""
MAX_UNCERTAIN = 5.0
"""Seconds without a sign that they are coming after which a node no longer waits for blocks that are not its own to
fetch: the node that it gets them from may be waiting for the very caller that is kept waiting."""
MAX_QUEUED = 15.0
"""Seconds in the queue for a stream, after which a caller is told to ask again: less than MAX_SILENCE, after which the
caller gives the node up."""
RETRY_AFTER = 1.0
"""Seconds after which a caller that was turned away is to ask again."""
MIN_RETRY_WAIT = 0.1
"""Seconds between two requests to a busy node, whatever it says."""
MAX_REDIRECTS = 4
"""How often a request is sent on from node to node; wire.MAX_HOPS is the most that a node accepts."""
NOT_STORED_TTL = 10.0
"""Seconds for which a node that had nothing of an object is not asked again whether it has."""
RANDOM_CANDIDATES = 2
"""Nodes that are asked whether they have stored what a slow node does not bring."""
HEDGE_EVERY = 1.0
"""Seconds between looks of one flight for another holder of what a slow node, or the last node of all, is sending."""
STORED_HEDGE_EVERY = 0.5
"""Seconds between such looks of all flights together. When each flight looked every second, the last ten seconds of 16
nodes in the lab went into questions."""
SUBSTITUTE_AFTER = 6.0
"""Seconds after which the node next in order is asked to fetch what a slow one does not bring."""
SUBSTITUTE_LOADED_AFTER = 18.0
"""The same, when the slow node's link is as good as the others'. When nodes start together, the one that the origin
serves first has to send to all the others for a while: it was called slow, and stripes came twice from the origin."""
IDLE_WORKERS_SHARE = 8
"""Less than this part of the workers at work means that what is under way is the last there is."""
RUN_BYTES = 2 << 20
"""Bytes of stored blocks that a node sends at a time."""
MAX_FAILED_NODES = 3
"""Nodes that did not answer, after which a stripe comes from the origin."""
MIN_RANKING_LENGTH = 16
"""Nodes of a ranking that a cluster without sub-owners looks at."""
MAX_LIKELY_HOLDERS = 2
"""Nodes next in order that an owner asks whether they have a stripe before it reads the origin: after a node joined,
the one that owned the stripe before is the next."""
MAX_CLUSTER_ORIGIN_REQUESTS = 64
"""Requests to the origin at a time, of all nodes together: enough for a NIC's worth of slow connections. Few at a time,
so that stripes come in one after the other, and the other nodes need not hold one request per stripe."""
FAN_OUT = 16
"""Nodes that one node sends one stripe to, as long as others may send it, too."""
PREFETCH_HEADROOM = 2.0
"""Requests to other nodes at a time, over those that are enough for a link when all links are alike. A node with a
tenth of the others' bandwidth, whose 48 requests for itself shared its link with the stripes that the others waited
for, held up a cluster of 100 to 2.5 times the time."""
MIN_PREFETCH_FLIGHTS = 4
"""Requests at a time that even the slowest link has."""
RATE_SAMPLES_KEPT = 32
"""Receive rates that are kept, one per request: those of some seconds, and their median takes 10 us."""
MAX_RATED_NODES = 20_000
"""Nodes whose receive rates are kept."""
SLOW_LINK_FACTOR = 4
"""A node that receives so many times more slowly than the median has a slow link."""
MIN_RATE_SAMPLES = 8
"""Receive rates from which on their median means something."""
MAX_DIRECT_NODES = 128
"""Nodes of the largest cluster in which all ask the owner of a stripe. Each request takes a node about 0.6 ms: 10,000
nodes that asked one owner would wait 6 s for the last of them, most without a connection."""
CONCURRENT_OWNERS = MAX_CLUSTER_ORIGIN_REQUESTS // 2
"""Owners that fetch from the origin at the same time, in a larger cluster one group of them after the other. A node
follows no more stripes than it has threads: when 100 owners fetched two each, all threads of all nodes were held by
stripes that came a drop at a time, and the links were four fifths idle until the origin was done."""
REDIRECT_BACKLOG_REQUESTS = 4
"""Requests' worth of bytes that a node may have promised more than another holder before it sends callers on to that
one: each detour costs a round trip and some CPU. In the lab of 16 nodes 2 sent on every second request, 4 two fifths,
in the same time (1.18 to 1.28 times the bound, with the CPUs busy). With 8 and more 100 simulated nodes take longer."""
OWNER_WINDOW_STRIPES = 3
"""Stripes of one owner that a node asks for ahead at a time: the next ones have to be asked for before the first is
through, and more do not come sooner. In a lab of 8 nodes that asked for 64 stripes at a time, the node that was late
with its plan got a third of the others' bytes, and every queue was full of stripes that nobody needed yet."""
MAX_RELAY_DEPTH = 6
"""Nodes that a stripe passes through between its owner and the node that asks."""
RELAYS_COMPARED = 16
"""Holders of a stripe that are compared to find the one that sends it to the next node: a choice among all took 50 us
with 1,000 nodes and 160 us with 4,000; this one takes 4."""


def build_route(
    version: ObjectVersion,
    block_size: int,
    stripe_bytes: int,
    members: Sequence[Member],
    own_name: str,
    *,
    stores_remote: bool = True,
    owners: Callable[[ObjectId, int, Sequence[Member]], Sequence[int]] = find_stripe_owners,
) -> Route | None:
    """The route of an object for a node of this name; None: there are no other nodes. `stores_remote` goes into the
    route; `owners` is like find_stripe_owners."""
    if not any(member.name != own_name for member in members):
        return None
    blocks = max(1, stripe_bytes // block_size)
    count = stripe_count(version.size, blocks * block_size)
    owned_by = owners(version.id, count, members)
    names = [member.name for member in members]
    mine = (
        names.index(own_name)
        if own_name in names
        else len([name for name in names if name < own_name]) % len(names)
    )
    return Route(
        blocks,
        bytes(names[owner] != own_name for owner in owned_by),
        fetch_order(owned_by, len(members), mine, CONCURRENT_OWNERS),
        stores_remote,
        [names[owner] for owner in owned_by],
        OWNER_WINDOW_STRIPES,
        stores_remote and len(members) > CONCURRENT_OWNERS,
        len({owner for owner in owned_by if names[owner] != own_name}),
    )


def sub_owner_count(member_count: int) -> int:
    """How many sub-owners a stripe has in a cluster of so many nodes; 0: all ask the owner. With the square root the
    owner serves about as many nodes as each sub-owner does."""
    return math.isqrt(member_count) if member_count > MAX_DIRECT_NODES else 0


def ranking_length(member_count: int) -> int:
    """How many nodes of a stripe's ranking matter in a cluster of so many."""
    return max(MIN_RANKING_LENGTH, sub_owner_count(member_count) + 1)


def is_sub_owner(ranking: Sequence[Member], own_name: str, member_count: int) -> bool:
    """Whether other nodes ask the node of this name for a stripe of this ranking in the place of its owner."""
    return any(member.name == own_name for member in ranking[1 : sub_owner_count(member_count) + 1])


def select_nodes_to_ask(
    ranking: Sequence[Member], own_name: str, may_admit: Callable[[str], bool], member_count: int
) -> tuple[list[Member], list[str]]:
    """The nodes that the node of this name asks for a stripe of this ranking, one after the other, and the names of
    those that `admit_request` turns down. These are the nodes ahead of it in the ranking; in a large cluster two
    sub-owners come before them. So a request only ever goes to a node further ahead, and never in a circle."""
    most = sub_owner_count(member_count)
    wanted = list(ranking[:MAX_FAILED_NODES])
    if most and not any(member.name == own_name for member in ranking[: most + 1]):
        place = hash_seed(own_name)
        between = ranking[1 : most + 1]
        wanted = [between[(place + turn) % len(between)] for turn in range(min(2, len(between)))] + wanted
    asked: list[Member] = []
    passed: list[str] = []
    for member in dict.fromkeys(wanted):
        if member.name == own_name:
            break
        if may_admit(member.name):
            asked.append(member)
        else:
            passed.append(member.name)
    return asked, passed


def likely_holders(ranking: Sequence[Member], own_name: str) -> list[Member]:
    """The other nodes that are most likely to have a stripe of this ranking stored."""
    return [member for member in ranking[: MAX_LIKELY_HOLDERS + 1] if member.name != own_name][
        :MAX_LIKELY_HOLDERS
    ]


def is_acting_owner(ranking: Sequence[Member], own_name: str, failed_nodes: Collection[str]) -> bool:
    """Whether the node of this name is the owner of a stripe of this ranking once `failed_nodes` are left out."""
    for member in ranking:
        if member.name == own_name:
            return True
        if member.name not in failed_nodes:
            return False
    return False


def should_fetch(
    ranking: Sequence[Member], own_name: str, failed_nodes: Collection[str], hops: int, member_count: int
) -> bool:
    """Whether the node of this name fetches a stripe that it has not got for a node that asks, which could not get it
    from `failed_nodes` and was sent on `hops` times. A caller that another node sent on goes back to that one instead,
    so that only one node fetches a stripe; unless it was sent on to the owner itself."""
    return (
        is_acting_owner(ranking, own_name, failed_nodes) or is_sub_owner(ranking, own_name, member_count)
    ) and not (hops and ranking[0].name != own_name)


def may_serve(
    ranking: Sequence[Member],
    own_name: str,
    member_count: int,
    *,
    failed_nodes: Collection[str],
    hops: int,
    stored_only: bool,
    comes_from_caller: bool,
    is_coming: Callable[[], bool],
) -> bool:
    """Whether a node answers a request for blocks of which it has not stored all. `comes_from_caller`: it gets this
    stripe from the very node that asks; `is_coming()`: the blocks that are missing are on their way to it."""
    if stored_only or comes_from_caller:
        return False
    return should_fetch(ranking, own_name, failed_nodes, hops, member_count) or is_coming()


def is_mostly_idle(transfers: int, peer_workers: int) -> bool:
    """Whether most of the workers for other nodes have nothing to do: what is under way is the last there is."""
    return transfers < peer_workers // IDLE_WORKERS_SHARE


@dataclass(frozen=True)
class SourceStep:
    """The next node that a flight asks, or the origin."""

    member: Member | None
    """None: the origin."""
    stored_only: bool = False
    """The node is asked for the blocks that it has stored, and does not fetch any."""
    substitutes: Sequence[Member] = ()
    """The nodes that may fetch the blocks in its place when it is slow, in their order."""
    is_owner: bool = False
    """The node that asks owns the stripe."""


def source_steps(
    ranking: Sequence[Member],
    own_name: str,
    failed_nodes: list[str],
    may_admit: Callable[[str], bool],
    may_have: Callable[[Member], bool],
    member_count: int,
) -> Iterator[SourceStep]:
    """Where the node of this name looks for a stripe of this ranking, one after the other, until it has all of it: the
    nodes ahead of it; those next in order that `may_have` it stored; the origin. Nodes that `admit_request` turns down
    are appended to `failed_nodes`; the caller appends those that did not answer."""
    asked, passed = select_nodes_to_ask(ranking, own_name, may_admit, member_count)
    failed_nodes += passed
    for number, member in enumerate(asked):
        yield SourceStep(member, substitutes=asked[number + 1 :])
    owner = not ranking or ranking[0].name == own_name
    if not owner or len(ranking) > 1:
        for member in likely_holders(ranking, own_name):
            if may_have(member) and member.name not in failed_nodes:
                yield SourceStep(member, stored_only=True)
    yield SourceStep(None, is_owner=owner)


@dataclass
class RedirectState:
    """How far a request was sent on.

    | What happens | `target` | `no_redirect` | `hops` |
    |---|---|---|---|
    | `follow_redirect` to a node that can be asked | that node | unchanged | one more |
    | `follow_redirect` to another, or `return_to_member` | `member` | True | 0 |
    """

    member: Member
    """The node that is asked for the stripe."""
    target: Member
    """The node that the request goes to now: `member`, or a holder that it was sent on to."""
    no_redirect: bool = False
    """The node has to send the blocks itself: a holder that it named had nothing to give."""
    hops: int = 0

    @property
    def is_redirected(self) -> bool:
        """Whether the request was sent on to another holder."""
        return self.target is not self.member

    def follow_redirect(self, redirect_target: Member | None, own_name: str) -> bool:
        """The request is sent on to this node, None: to nobody we know; returns whether it goes there."""
        if redirect_target is None or self.no_redirect or redirect_target.name == own_name:
            self.return_to_member()
            return False
        self.target, self.hops = redirect_target, self.hops + 1
        return True

    def return_to_member(self) -> None:
        """The request goes to `member`, which has to send the blocks itself."""
        self.target, self.no_redirect, self.hops = self.member, True, 0


def origin_request_limit(concurrency: int, member_count: int) -> int:
    """Requests to the origin at a time that each of so many nodes may have for stripes of its own."""
    return max(2, min(concurrency, -(-MAX_CLUSTER_ORIGIN_REQUESTS // max(1, member_count))))


def fallback_request_limit(budget: int, member_count: int) -> int:
    """Requests to the origin at a time that each of so many nodes may have for stripes of nodes that do not answer: its
    share of the cluster's budget, one at least."""
    return max(1, budget // max(1, member_count))


class ReceiverRates:
    """How fast the nodes that ask this one receive, as they say themselves. One thread writes, any may read: the median
    of the last RATE_SAMPLES_KEPT rates is replaced as a whole."""

    def __init__(self) -> None:
        self._recent_rates: deque[int] = deque(maxlen=RATE_SAMPLES_KEPT)
        self._rate_by_node: BoundedDict[str, int] = BoundedDict(MAX_RATED_NODES)
        self._median_rate = 0.0

    def record_rate(self, name: str, receive_rate: int) -> None:
        """The node of this name receives so many bytes per second at best; 0: it does not know."""
        if receive_rate:
            self._rate_by_node[name] = receive_rate
            self._recent_rates.append(receive_rate)
            if len(self._recent_rates) >= MIN_RATE_SAMPLES:
                self._median_rate = statistics.median(self._recent_rates)

    def has_normal_link(self, name: str) -> bool:
        """Whether a node's link is like the others': if it gives little, it only has much to do. False while too little
        is known."""
        return self._rate_by_node.get(name, 0) * SLOW_LINK_FACTOR > self._median_rate > 0

    def max_prefetch_flights(self, own_rate: float | None, peer_workers: int) -> int:
        """How many of `peer_workers` requests at a time are enough for the link of this node, whose `own_rate` is in
        bytes per second: fewer where it is much slower than the others', so that the stripes that other nodes wait for
        need not share it with so much that only this node wants."""
        if own_rate is None or not self._median_rate:
            return peer_workers
        return max(
            MIN_PREFETCH_FLIGHTS,
            min(peer_workers, round(peer_workers * PREFETCH_HEADROOM * own_rate / self._median_rate)),
        )


class Excluding(Container[str]):
    """All of `names` but those `excluded`: no set of thousands is made for one request."""

    def __init__(self, names: Container[str], excluded: Container[str]) -> None:
        self._names = names
        self._excluded = excluded

    def __contains__(self, name: object) -> bool:
        return name in self._names and name not in self._excluded


@dataclass
class Holder:
    """A node that has, or gets, one stripe."""

    depth: int
    """Nodes between this one and the holder, itself included."""
    children: int = 0
    """Nodes that get the stripe from the holder."""


@dataclass
class StripeHolders:
    """All holders of one stripe."""

    by_name: dict[str, Holder]
    relays: deque[str]
    """The names of those that may send it to further nodes, in turn."""


class RelayTrees:
    """Decides which holder sends a stripe of this node to the next node that asks. A node that many ask at once sends
    each stripe to few of them, and sends the others on to those: every node sends about as much as it receives, and no
    stripe has to wait for one node's link. Used by one thread.

    This node sends a stripe itself as long as it is hardly more behind than the other holders. Then each caller is
    given the holder with the fewest unsent bytes, as the nodes report them with each request, of RELAYS_COMPARED that
    are looked at. A node that is a holder already and asks again is served by this node: a node only ever depends on a
    holder that came before it, so no node waits for itself.

    | What happens to a node, for one stripe | Next state |
    |---|---|
    | asks for the first time | holder, and relay unless it is too deep |
    | has FAN_OUT children | holder, and no relay any more |
    | the stripe is one of the oldest beyond `max_stripes` | forgotten |
    """

    def __init__(self, own_name: str, max_stripes: int = 20_000) -> None:
        self._own_name = own_name
        self._holders_by_stripe: BoundedDict[tuple[ObjectId, int], StripeHolders] = BoundedDict(max_stripes)
        self._unsent_bytes: dict[str, int] = {}

    def record_unsent(self, name: str, unsent_bytes: int) -> None:
        """The node of this name has promised so many bytes and not sent them yet."""
        self._unsent_bytes[name] = unsent_bytes

    def assign_parent(
        self,
        stripe: tuple[ObjectId, int],
        receiver: str,
        usable_nodes: Container[str],
        nbytes: int,
        *,
        no_redirect: bool = False,
    ) -> str:
        """The name of the holder, be it this node, that sends these `nbytes` of a stripe to `receiver`, which is a
        holder from now on. `usable_nodes` are the other holders that may be chosen; with `no_redirect` this node
        sends."""
        holders = self._holders_by_stripe.get(stripe)
        if holders is None:
            holders = StripeHolders({self._own_name: Holder(0)}, deque())
        self._holders_by_stripe[stripe] = holders
        if receiver in holders.by_name or no_redirect:
            if receiver not in holders.by_name:
                self._add_holder(holders, receiver, 1)
            return self._own_name
        chosen = self._pick_relay(holders, usable_nodes)
        ours = self._unsent_bytes.get(self._own_name, 0) - REDIRECT_BACKLOG_REQUESTS * nbytes
        mine = holders.by_name[self._own_name]
        if chosen is None or (mine.children < FAN_OUT and ours <= self._unsent_bytes.get(chosen, 0)):
            chosen = self._own_name
        holder = holders.by_name[chosen]
        holder.children += 1
        if holder.children == FAN_OUT and chosen != self._own_name:
            holders.relays.remove(chosen)
        self._add_holder(holders, receiver, holder.depth + 1)
        self._unsent_bytes[chosen] = self._unsent_bytes.get(chosen, 0) + nbytes
        return chosen

    def choose_sender(
        self,
        stripe: tuple[ObjectId, int],
        caller: str,
        live_names: Container[str],
        nbytes: int,
        *,
        failed_nodes: Collection[str],
        caller_unsent: int,
        own_unsent: int,
        no_redirect: bool,
        hops: int,
    ) -> str:
        """The node that sends these `nbytes` of a stripe to a caller: this one, or another holder that the caller is
        sent on to. `caller_unsent` and `own_unsent` are the bytes that wait at either for room on their way out."""
        self.record_unsent(caller, caller_unsent)
        self.record_unsent(self._own_name, own_unsent)
        usable = Excluding(live_names, (caller, *failed_nodes))
        return self.assign_parent(stripe, caller, usable, nbytes, no_redirect=no_redirect or hops > 0)

    def _add_holder(self, holders: StripeHolders, name: str, depth: int) -> None:
        holders.by_name[name] = Holder(depth)
        if depth < MAX_RELAY_DEPTH:
            holders.relays.append(name)

    def _pick_relay(self, holders: StripeHolders, usable_nodes: Container[str]) -> str | None:
        """The usable relay with the fewest unsent bytes, of the next RELAYS_COMPARED."""
        chosen: str | None = None
        least, looked_at = (0, 0), 0
        for name in holders.relays:
            if name not in usable_nodes:
                continue
            owed = self._unsent_bytes.get(name, 0), holders.by_name[name].depth
            if chosen is None or owed < least:
                chosen, least = name, owed
            looked_at += 1
            if looked_at == RELAYS_COMPARED:
                holders.relays.rotate(-RELAYS_COMPARED)
                break
        return chosen
