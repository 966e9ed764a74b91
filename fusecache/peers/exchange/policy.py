"""Whom a node asks for a stripe, and what an asked node does: the rules of the exchange, without I/O. The simulation in
benchmarks/ runs these, too."""

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
"""Of a ranking, as far as anybody looks in a cluster without deputies."""
MAX_LIKELY_HOLDERS = 2
"""Nodes next in order that an owner asks whether they have a stripe before it goes to the origin: after a node came,
the one that had the stripe before is the next."""
MAX_CLUSTER_ORIGIN_REQUESTS = 64
"""To the origin at a time, of all nodes together: enough for a NIC's worth of slow connections. Few at a time, so that
stripes come in one after the other and the others need not hold one request per stripe."""
FAN_OUT = 16
"""Nodes that one node sends one stripe to, as long as others may send it, too."""
PREFETCH_HEADROOM = 2.0
"""Requests to other nodes at a time, over those that are enough for a link when all links are alike. A node with a
tenth of the others' bandwidth, whose 48 requests for itself shared its link with the stripes that the others waited
for, held up a cluster of 100 to 2.5 times the time."""
MIN_PREFETCH_FLIGHTS = 4
"""Requests at a time that even the slowest link has."""
RATE_SAMPLES_KEPT = 32
"""Requests whose senders' paces are known: of some seconds, and their median takes 10 us."""
MAX_RATED_NODES = 20_000
"""Nodes whose own paces are known."""
SLOW_LINK_FACTOR = 4
"""Times that a node receives more slowly than what is usual, from which on it is its link that is slow."""
MIN_RATE_SAMPLES = 8
"""Of those, as many as it takes to say what is usual."""
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
in the same time (1.18 to 1.28 times the bound, with the CPUs busy). From 8 on 100 simulated nodes take longer."""
OWNER_WINDOW_STRIPES = 3
"""Stripes of one owner that a node asks for ahead at a time: the next ones have to be asked for before the first is
through, and more do not come sooner. In a lab of 8 nodes that asked for 64 stripes at a time, whoever was late with
its plan got a third of what the others got, and every queue was full of what nobody needed yet."""
MAX_RELAY_DEPTH = 6
"""Nodes that a stripe passes through between its owner and whoever asks."""
RELAYS_COMPARED = 16
"""Holders of a stripe, of those whose turn it is, that are compared to find the one that sends it to the next node: a
choice among all took 50 us with 1,000 nodes and 160 us with 4,000; this one takes 4."""


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
    """Where the stripes of an object come from; None: there are no others. `keep`: see Route, `owners`: placement."""
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
    """How many nodes, those next in a stripe's ranking, stand between its owner and the others in a cluster of so many.
    The owner has to do with no more nodes than each of them, at best with the root of all; 0: all ask the owner."""
    return math.isqrt(member_count) if member_count > MAX_DIRECT_NODES else 0


def ranking_length(member_count: int) -> int:
    """How many of a stripe's ranking anybody looks at in a cluster of so many."""
    return max(MIN_RANKING_LENGTH, sub_owner_count(member_count) + 1)


def is_sub_owner(ranking: Sequence[Member], own_name: str, member_count: int) -> bool:
    """Whether others ask us for a stripe of this ranking instead of its owner."""
    return any(member.name == own_name for member in ranking[1 : sub_owner_count(member_count) + 1])


def select_nodes_to_ask(
    ranking: Sequence[Member], own_name: str, may_admit: Callable[[str], bool], member_count: int
) -> tuple[list[Member], list[str]]:
    """Who is asked for a stripe with this ranking, one after the other, and who was passed over: those ahead of us, in
    a large cluster two deputies before them. Whoever asks only ever asks who is further ahead."""
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
    """Who may have a stripe of this ranking stored, though we are the one to fetch it."""
    return [member for member in ranking[: MAX_LIKELY_HOLDERS + 1] if member.name != own_name][
        :MAX_LIKELY_HOLDERS
    ]


def is_acting_owner(ranking: Sequence[Member], own_name: str, failed_nodes: Collection[str]) -> bool:
    """Whether we are the one to bring a stripe of this ranking, when those nodes did not answer who asks."""
    for member in ranking:
        if member.name == own_name:
            return True
        if member.name not in failed_nodes:
            return False
    return False


def should_fetch(
    ranking: Sequence[Member], own_name: str, failed_nodes: Collection[str], hops: int, member_count: int
) -> bool:
    """Whether we bring a stripe that is not here for who asks. Whoever was sent on to us by another node goes back to
    that one instead: it must be somebody's only."""
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
    """Where a flight looks next: at this node, or at the origin (None). `stored_only`: it gives what it has, and no
    more. `behind`: the nodes that may stand in for it. `owner`: the stripe is our own."""

    member: Member | None
    stored_only: bool = False
    substitutes: Sequence[Member] = ()
    is_owner: bool = False


def source_steps(
    ranking: Sequence[Member],
    own_name: str,
    failed_nodes: list[str],
    may_admit: Callable[[str], bool],
    may_have: Callable[[Member], bool],
    member_count: int,
) -> Iterator[SourceStep]:
    """Where a flight looks for a stripe with this ranking, until it has all of it: the nodes ahead of us; those next in
    order that may have it stored; the origin. Nodes that are passed over, and (by the caller) those that did not
    answer, are put into `failed`. There are so many `members` in the cluster."""
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
    """A node that is asked for a stripe, and `target`, the one it sent us on to, or itself. Nobody is sent on twice:
    who has nothing to give after all leads back to `member`, which then has to give (`direct`)."""

    member: Member
    target: Member
    no_redirect: bool = False
    hops: int = 0

    @property
    def is_redirected(self) -> bool:
        """Whether we were sent to another holder."""
        return self.target is not self.member

    def follow_redirect(self, redirect_target: Member | None, own_name: str) -> bool:
        """We are sent on to `found`, None: nobody we know; returns whether we go there."""
        if redirect_target is None or self.no_redirect or redirect_target.name == own_name:
            self.return_to_member()
            return False
        self.target, self.hops = redirect_target, self.hops + 1
        return True

    def return_to_member(self) -> None:
        """Ask `member` itself from now on."""
        self.target, self.no_redirect, self.hops = self.member, True, 0


def origin_request_limit(concurrency: int, member_count: int) -> int:
    """Requests to the origin at a time of one of so many nodes, for stripes of its own."""
    return max(2, min(concurrency, -(-MAX_CLUSTER_ORIGIN_REQUESTS // max(1, member_count))))


def fallback_request_limit(budget: int, member_count: int) -> int:
    """The same for stripes of nodes that don't answer: a share of the cluster's budget, by the nodes alive."""
    return max(1, budget // max(1, member_count))


class ReceiverRates:
    """How fast those that ask us receive, as they say: the last PACES_KEPT of them. One thread tells, any may ask."""

    def __init__(self) -> None:
        self._recent_rates: deque[int] = deque(maxlen=RATE_SAMPLES_KEPT)
        self._rate_by_node: BoundedDict[str, int] = BoundedDict(MAX_RATED_NODES)
        self._median_rate = 0.0

    def record_rate(self, name: str, receive_rate: int) -> None:
        """A node receives so many bytes per second at best; 0: it does not know."""
        if receive_rate:
            self._rate_by_node[name] = receive_rate
            self._recent_rates.append(receive_rate)
            if len(self._recent_rates) >= MIN_RATE_SAMPLES:
                self._median_rate = statistics.median(self._recent_rates)

    def has_normal_link(self, name: str) -> bool:
        """Whether a node that gives little has a link like the others': it only has much to do."""
        return self._rate_by_node.get(name, 0) * SLOW_LINK_FACTOR > self._median_rate > 0

    def max_prefetch_flights(self, own_rate: float | None, peer_workers: int) -> int:
        """Requests at a time, of `crew`, that are enough for our link: fewer where it is much slower than the others',
        so that what they wait for does not have to share it with so much that only we want."""
        if own_rate is None or not self._median_rate:
            return peer_workers
        return max(
            MIN_PREFETCH_FLIGHTS,
            min(peer_workers, round(peer_workers * PREFETCH_HEADROOM * own_rate / self._median_rate)),
        )


class Excluding(Container[str]):
    """All these names but a few: no set of thousands is made for one request."""

    def __init__(self, names: Container[str], excluded: Container[str]) -> None:
        self._names = names
        self._excluded = excluded

    def __contains__(self, name: object) -> bool:
        return name in self._names and name not in self._excluded


@dataclass
class Holder:
    """A node that has, or gets, one stripe: how many nodes it is away from us, and how many get it from there."""

    depth: int
    children: int = 0


@dataclass
class StripeHolders:
    """All of one stripe, and the names of those that may send it to further nodes, in turn."""

    by_name: dict[str, Holder]
    relays: deque[str]


class RelayTrees:
    """Who passes our stripes on. A node that many ask at once gives each stripe to few of them, and sends the others to
    those: everybody sends about as much as it takes, and no stripe has to wait for one node's link.

    We give a stripe ourselves as long as we are hardly more behind than the others. Then each asking node is given the
    holder with the fewest bytes waiting for room on their way out, as the nodes say of themselves with each request, of
    LOOKED_AT that are compared. Whoever is a holder already and asks again is served by us: a node only ever depends on
    one that came before it, so nobody waits for itself.
    """

    def __init__(self, own_name: str, max_stripes: int = 20_000) -> None:
        self._own_name = own_name
        self._holders_by_stripe: BoundedDict[tuple[ObjectId, int], StripeHolders] = BoundedDict(max_stripes)
        self._unsent_bytes: dict[str, int] = {}

    def record_unsent(self, name: str, unsent_bytes: int) -> None:
        """So many bytes wait at a node for room on their way out."""
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
        """The holder that gives these `nbytes` of a stripe to `asking`, which is a holder from now on; our own name: we
        do. `usable` are the others that are alive."""
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
        """Of the next LOOKED_AT others that are usable, the one that owes least."""
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
