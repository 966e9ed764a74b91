"""Which node owns which stripe: weighted rendezvous hashing. Pure.

Each node has a score for each stripe, whatever the other nodes are: -weight / ln(hash as a number in (0, 1)). The node
with the highest score owns the stripe, so that the shares are in proportion to the weights (Schindelhauer and
Schomaker, SPAA 2005). A node that leaves gives its own stripes away and no others, to all the rest in proportion; one
that joins takes its share, and no other stripe moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nlargest
from itertools import repeat

import xxhash

from fusecache.peers.member import Member
from fusecache.types import ObjectId

WHOLE_OBJECT = -1
"""The stripe number under which the nodes are ranked for an object as a whole."""


def stripe_count(size: int, stripe_bytes: int) -> int:
    """Number of stripes of `stripe_bytes` in an object of `size` bytes."""
    return -(-size // stripe_bytes)


def _member_hashes(object_id: ObjectId, stripe: int, seeds: Sequence[int]) -> list[int]:
    """A hash of the stripe per node. No loop in Python: 0.5 ms for 10,000 nodes."""
    key = b"%s/%d" % (object_id.encode("ascii"), stripe)
    return list(map(xxhash.xxh3_64_intdigest, repeat(key), seeds))


def _score(digest: int, weight: int) -> float:
    return -weight / math.log(((digest >> 12) + 0.5) / 2.0**52)  # of 52 bits, so that it never rounds to 1


def _group_by_weight(members: Sequence[Member]) -> list[tuple[int, list[int]]]:
    """(weight, indexes of the nodes that have it). Among nodes of one weight the score grows with the hash, so that
    only the largest hashes need a logarithm; most clusters have one weight, or a few."""
    found: dict[int, list[int]] = {}
    for at, member in enumerate(members):
        found.setdefault(member.weight, []).append(at)
    return list(found.items())


def rank_members(
    object_id: ObjectId, stripe: int, members: Sequence[Member], limit: int | None = None
) -> list[Member]:
    """The nodes in the order of their scores for this stripe, the owner first; with `limit` the first so many of
    them."""
    most = len(members) if limit is None else limit
    hashes = _member_hashes(object_id, stripe, [member.seed for member in members])
    scored = []
    for weight, indexes in _group_by_weight(members):
        least = 0
        if 0 < most < len(indexes):
            least = nlargest(most, [hashes[at] for at in indexes])[-1]
        scored += [
            (_score(hashes[at], weight), members[at].name, members[at])
            for at in indexes
            if hashes[at] >= least
        ]
    scored.sort(reverse=True)
    return [member for _, _, member in scored[:most]]


def find_stripe_owners(object_id: ObjectId, count: int, members: Sequence[Member]) -> list[int]:
    """Index into `members` of the owner of each of the first `count` stripes. `members` must not be empty."""
    groups = [
        (weight, indexes, [members[at].seed for at in indexes])
        for weight, indexes in _group_by_weight(members)
    ]
    found = []
    for stripe in range(count):
        best = []
        for weight, indexes, seeds in groups:
            hashes = _member_hashes(object_id, stripe, seeds)
            largest = max(hashes)
            best.append((_score(largest, weight), indexes[hashes.index(largest)]))
        found.append(max(best)[1])
    return found


def fetch_order(
    owner_by_stripe: Sequence[int], member_count: int, own_index: int | None, group_limit: int = 1 << 30
) -> list[int]:
    """The order in which one node fetches the stripes whose owners are given: one stripe of each owner in turn,
    beginning with its own, then its successor's. So nodes that start together ask different owners, and all of them ask
    for each stripe of an owner at about the time when that stripe comes from the origin. `own_index` is None for a node
    that is no member.

    More than `group_limit` owners are divided into groups, which all nodes take in the same order: within a group a
    node begins with itself, or at a place of its own.
    """
    first = 0 if own_index is None else own_index
    size = -(-member_count // -(-member_count // group_limit))
    places: list[tuple[int, int, int]] = []
    counts = [0] * member_count
    for owner in owner_by_stripe:
        group, place = divmod(owner, size)
        places.append((counts[owner], group, (place - first) % size))
        counts[owner] += 1
    return sorted(range(len(owner_by_stripe)), key=places.__getitem__)
