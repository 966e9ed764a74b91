"""Which node has which stripe: weighted rendezvous hashing. Pure.

Each node scores each stripe, with no regard to the others: -weight / ln(hash as a number in (0, 1)); the highest score
has it, in proportion to the weights (Schindelhauer and Schomaker, SPAA 2005). So a node that leaves gives away its own
stripes and no others, to all the rest in proportion, and one that joins takes its share and nothing else moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nlargest

import xxhash

from fusecache.peers.member import Member
from fusecache.types import ObjectId


def stripe_count(size: int, stripe: int) -> int:
    """Stripes of `stripe` bytes of an object of `size` bytes."""
    return -(-size // stripe)


def _score(seed: int, object_id: ObjectId, stripe: int, weight: int) -> float:
    digest = xxhash.xxh3_64_intdigest(b"%s/%d" % (object_id.encode("ascii"), stripe), seed)
    return -weight / math.log(((digest >> 12) + 0.5) / 2.0**52)  # of 52 bits, so that it never rounds to 1


def _seed(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def ranking(
    object_id: ObjectId, stripe: int, members: Sequence[Member], limit: int | None = None
) -> list[Member]:
    """The nodes in the order in which they have to do with this stripe: the owner first. `limit`: only so many."""
    scored = [
        (_score(_seed(member.name), object_id, stripe, member.weight), member.name, member)
        for member in members
    ]
    best = sorted(scored, reverse=True) if limit is None else nlargest(limit, scored)
    return [member for _, _, member in best]


def owners(object_id: ObjectId, stripes: int, members: Sequence[Member]) -> list[int]:
    """Index into `members` of the owner of each stripe. There has to be a member."""
    seeded = [(_seed(member.name), member.weight) for member in members]
    found = []
    for stripe in range(stripes):
        scores = [_score(seed, object_id, stripe, weight) for seed, weight in seeded]
        found.append(scores.index(max(scores)))
    return found


def fetch_order(owned_by: Sequence[int], members: int, me: int | None) -> list[int]:
    """The order in which one node fetches the stripes whose owners are given: one of each owner in turn, beginning with
    itself, then its successor. So nodes that start together ask each owner one at a time, and each of an owner's
    stripes, in ascending order, is asked for by all about when it comes from the origin.
    """
    first = 0 if me is None else me
    places, counts = [], [0] * members
    for owner in owned_by:
        places.append(counts[owner] * members + (owner - first) % members)
        counts[owner] += 1
    return sorted(range(len(owned_by)), key=places.__getitem__)
