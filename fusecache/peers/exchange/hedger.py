"""When a second request goes out for blocks that are already awaited, and to which nodes. Does no I/O."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Sequence

from fusecache.peers.exchange import policy
from fusecache.peers.exchange.breaker import SpeedComparison
from fusecache.peers.member import Member


class Hedger:
    """Decides for all flights of one node together. Thread-safe: `_lock` guards `_next_search_at` and is a leaf.

    State: a search for nodes that have something stored is allowed from `_next_search_at` on, and moves that
    policy.STORED_HEDGE_EVERY seconds into the future.
    """

    def __init__(
        self,
        own_name: str,
        members: Callable[[], Sequence[Member]],
        speeds: SpeedComparison,
        receiver_rates: policy.ReceiverRates,
        is_mostly_idle: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        sample: Callable[[Sequence[Member], int], list[Member]] = random.sample,
    ) -> None:
        """`is_mostly_idle` says whether hardly any request is under way; `sample` is like random.sample."""
        self.is_mostly_idle = is_mostly_idle
        self._own_name = own_name
        self._members = members
        self._speeds = speeds
        self._receiver_rates = receiver_rates
        self._clock = clock
        self._sample = sample
        self._lock = threading.Lock()
        self._next_search_at = 0.0

    def is_slow(self, name: str) -> bool:
        """Whether a node is much slower than its fellows."""
        return self._speeds.is_slow(name)

    def stored_candidates(self, excluded: Collection[str]) -> list[Member]:
        """A few nodes, chosen at random, that may have stored what a flight waits for; none of those that are excluded.
        Nothing if any flight got candidates a moment ago."""
        with self._lock:
            now = self._clock()
            if now < self._next_search_at:
                return []
            self._next_search_at = now + policy.STORED_HEDGE_EVERY
        others = [
            member
            for member in self._members()
            if member.name != self._own_name and member.name not in excluded
        ]
        return self._sample(others, min(len(others), policy.RANDOM_CANDIDATES))

    def is_substitute_due(self, name: str, waited_seconds: float) -> bool:
        """Whether a slow node was waited for so long that the next in order is to fetch the blocks. A node whose link
        is like the others' is given more time: it only has much to do."""
        loaded = self._receiver_rates.has_normal_link(name)
        return waited_seconds > (policy.SUBSTITUTE_LOADED_AFTER if loaded else policy.SUBSTITUTE_AFTER)
