"""The rankings of stripes among the nodes, kept while the members stay the same."""

from __future__ import annotations

import threading

from fusecache.bounded import BoundedDict
from fusecache.peers.exchange import policy
from fusecache.peers.member import Member
from fusecache.peers.membership.placement import rank_members
from fusecache.peers.membership.table import MembershipTable
from fusecache.types import ObjectId

_MAX_RANKINGS = 10_000


class RankingCache:
    """Ranks the members for stripes of `stripe_bytes`. Thread-safe: `_lock` guards the rankings and is a leaf; they are
    those of `_ranked_members`, and are dropped when the membership publishes another tuple."""

    def __init__(self, members: MembershipTable, stripe_bytes: int) -> None:
        self.stripe_bytes = stripe_bytes
        self._members = members
        self._lock = threading.Lock()
        self._ranked_members: tuple[Member, ...] = ()
        self._rankings: BoundedDict[tuple[ObjectId, int], list[Member]] = BoundedDict(_MAX_RANKINGS)

    def stripe_of(self, block: int, block_size: int) -> int:
        """Number of the stripe that holds a block."""
        return block // max(1, self.stripe_bytes // block_size)

    def ranking_of(self, object_id: ObjectId, stripe: int) -> list[Member]:
        """The nodes for one stripe, the owner first, as far as any node asks for. Not to be changed."""
        members = self._members.members()
        with self._lock:
            if members is not self._ranked_members:
                self._ranked_members = members
                self._rankings.clear()
            found = self._rankings.get((object_id, stripe))
        if found is None:
            # all nodes ask the owner for the same stripe: 2 ms each in a cluster of 10,000
            found = rank_members(object_id, stripe, members, policy.ranking_length(len(members)))
            with self._lock:
                if members is self._ranked_members:
                    self._rankings[object_id, stripe] = found
        return found
