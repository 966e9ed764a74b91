"""Whom a node asks for a stripe, and what an asked node does: the rules of the exchange, without I/O. The simulation in
benchmarks/ runs these, too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fusecache.loader import Route
from fusecache.peers.member import Member
from fusecache.peers.placement import fetch_order, owners, stripe_count
from fusecache.types import ObjectVersion

FAILURES = 3
"""Nodes that did not answer, after which a stripe comes from the origin."""
ASKED_FIRST = 2
"""Nodes next in order that an owner asks whether they have a stripe before it goes to the origin: after a node came,
the one that had the stripe before is the next."""
ORIGIN_REQUESTS = 64
"""To the origin at a time, of all nodes together: enough for a NIC's worth of slow connections. Few at a time, so that
stripes come in one after the other and the others need not hold one request per stripe."""
LEAST_STREAMS = 4
"""Answers that a node sends at a time before it calls itself loaded."""


def route_of(
    version: ObjectVersion,
    block_size: int,
    stripe: int,
    members: Sequence[Member],
    me: str,
    *,
    keep: bool = True,
) -> Route | None:
    """Where the stripes of an object come from; None: there are no others. `keep`: see Route."""
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
        fetch_order(owned_by, len(members), mine),
        keep,
    )


def ask_order(
    order: Sequence[Member], me: str, allowed: Callable[[str], bool]
) -> tuple[list[Member], list[str]]:
    """Who is asked for a stripe with this ranking, one after the other, and who was passed over: all ahead of us."""
    asked: list[Member] = []
    passed: list[str] = []
    for member in order:
        if member.name == me or len(asked) + len(passed) >= FAILURES:
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


def origin_slots(concurrency: int, members: int) -> int:
    """Requests to the origin at a time of one of so many nodes, for stripes of its own."""
    return max(2, min(concurrency, -(-ORIGIN_REQUESTS // max(1, members))))


def fallback_slots(budget: int, members: int) -> int:
    """The same for stripes of nodes that don't answer: a share of the cluster's budget, by the nodes alive."""
    return max(1, budget // max(1, members))


def is_loaded(sending: int, receiving: int) -> bool:
    """Whether a node that sends and receives so many answers should send callers to another holder: it gives more than
    it takes, which not all can do."""
    return sending >= max(LEAST_STREAMS, receiving)


@dataclass
class Takers:
    """Who got, or gets, one stripe from us, in the order they asked. Whoever is in here is served by us if it asks
    again: a node only ever depends on one that was here before it, so nobody waits for itself."""

    names: list[str]
    turn: int = 0

    def redirect(self, asking: str, usable: Callable[[str], bool]) -> str | None:
        """Another holder for this node, each of those before it in turn; None: serve it. Counts it as a holder."""
        if asking in self.names:
            return None
        for step in range(len(self.names)):
            found = self.names[(self.turn + step) % len(self.names)]
            if usable(found):
                self.turn += step + 1
                return found
        return None

    def add(self, asking: str) -> None:
        """It gets the stripe, from us or from whom we sent it to."""
        if asking and asking not in self.names:
            self.names.append(asking)
