"""Which stripes this node waits for, from which nodes, and how certain it is that they come."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator

from fusecache.types import ObjectId

StripeId = tuple[ObjectId, int]


class StripeDependencies:
    """The nodes that stripes are to come from, per stripe. Thread-safe: `_lock` guards both tables and is a leaf.

    | What happens to a stripe | Upstream nodes | Arrival certain at |
    |---|---|---|
    | `awaiting` begins | one more | unchanged |
    | `awaiting` ends | one less | unchanged |
    | `mark_arrival_certain` | unchanged | that time |
    | `forget_arrival` | unchanged | never |
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._upstream_by_stripe: dict[StripeId, list[str]] = {}
        self._certain_at_by_stripe: dict[StripeId, float] = {}

    def upstream_nodes(self, stripe: StripeId) -> Collection[str]:
        """The nodes from which blocks of this stripe are to come, and which may not have them yet."""
        with self._lock:
            return tuple(self._upstream_by_stripe.get(stripe, ()))

    @contextlib.contextmanager
    def awaiting(self, stripe: StripeId, name: str) -> Iterator[None]:
        """While this lasts, blocks of the stripe are to come from the node of this name."""
        with self._lock:
            self._upstream_by_stripe.setdefault(stripe, []).append(name)
        try:
            yield
        finally:
            with self._lock:
                names = self._upstream_by_stripe[stripe]
                names.remove(name)
                if not names:
                    del self._upstream_by_stripe[stripe]

    def mark_arrival_certain(self, stripe: StripeId, when: float) -> None:
        """At that time.monotonic() it was certain that the rest of the stripe comes to this node."""
        with self._lock:
            self._certain_at_by_stripe[stripe] = when

    def arrival_certain_at(self, stripe: StripeId) -> float:
        """When it was last certain that blocks of the stripe come, as time.monotonic(); 0: never."""
        with self._lock:
            return self._certain_at_by_stripe.get(stripe, 0.0)

    def forget_arrival(self, stripe: StripeId) -> None:
        """A request for the stripe is over: nothing is certain any more."""
        with self._lock:
            self._certain_at_by_stripe.pop(stripe, None)
