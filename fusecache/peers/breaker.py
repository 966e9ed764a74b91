"""Whom not to ask for a while: a circuit breaker and a speedometer per node."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_FIRST_REST = 1.0
_LONGEST_REST = 30.0
_BAD_REST = 60.0
"""Seconds without a node that sent wrong bytes, times how often it did."""
_SLOW_REST = 20.0
_WINDOW = 8.0
"""Seconds after which half of what is known of a node's speed is forgotten."""
_EVIDENCE = 4.0
"""Seconds of waiting for a node before it can be called slow, by the clock and summed over requests."""
_PAUSE = 3.0
_MUCH_SLOWER = 8.0


@dataclass
class _Speed:
    """How fast bytes of one kind come."""

    nbytes: float = 0.0
    seconds: float = 0.0
    """Summed over the requests that waited for them."""
    faded: float = 0.0
    last: float = -1e9
    since: float = 0.0
    """Since when requests wait without a long pause."""

    def fade(self, now: float) -> None:
        keep = 0.5 ** ((now - self.faded) / _WINDOW)
        self.nbytes *= keep
        self.seconds *= keep
        self.faded = now

    def add(self, nbytes: int, seconds: float, now: float) -> None:
        if now - self.last > _PAUSE:
            self.since = now
        self.fade(now)
        self.nbytes += nbytes
        self.seconds += seconds
        self.last = now

    def rate(self, now: float, evidence: float) -> float | None:
        self.fade(now)
        if self.seconds < evidence or now - self.since < evidence:
            return None
        return self.nbytes / self.seconds


@dataclass
class _Node:
    failures: int = 0
    rest_until: float = 0.0
    trying: bool = False
    """One request is out to see whether the node is back."""
    bad_blocks: int = 0
    why: str = ""
    stored: _Speed = field(default_factory=lambda: _Speed())
    coming: _Speed = field(default_factory=lambda: _Speed())


class Breakers:
    """One for all nodes. Thread-safe; the lock is a leaf. `clock` is like time.monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._nodes: dict[str, _Node] = {}

    def _node(self, name: str) -> _Node:
        return self._nodes.setdefault(name, _Node())

    def allowed(self, name: str) -> bool:
        """Whether the node may be asked. After its rest one request may, until that one's outcome is told."""
        with self._lock:
            node = self._nodes.get(name)
            if node is None or not node.why:
                return True
            if self._clock() < node.rest_until or node.trying:
                return False
            node.trying = True
            return True

    def succeeded(self, name: str) -> None:
        """It gave what it was asked for."""
        with self._lock:
            node = self._node(name)
            node.failures = 0
            node.trying = False
            node.why = ""

    def undecided(self, name: str) -> None:
        """It was asked, and what came of it says nothing of the node."""
        with self._lock:
            self._node(name).trying = False

    def failed(self, name: str, why: str) -> None:
        """It did not answer, or broke off."""
        with self._lock:
            node = self._node(name)
            node.failures += 1
            self._rest(node, why, min(_LONGEST_REST, _FIRST_REST * 2.0 ** min(node.failures - 1, 8)))

    def sent_wrong_bytes(self, name: str) -> None:
        """A block of it did not have its checksum."""
        with self._lock:
            node = self._node(name)
            node.bad_blocks += 1
            self._rest(node, "sent wrong bytes", _BAD_REST * node.bad_blocks)

    def is_slow(self, name: str) -> bool:
        """Whether it is much slower than its fellows, as far as that can be said."""
        with self._lock:
            now = self._clock()
            node = self._nodes.get(name)
            return node is not None and any(
                self._is_slow(node, getattr(node, kind).rate(now, _EVIDENCE), kind, now)
                for kind in ("stored", "coming")
            )

    def _is_slow(self, node: _Node, rate: float | None, kind: str, now: float) -> bool:
        if rate is None:
            return False
        others = [
            found
            for other in self._nodes.values()
            if other is not node and (found := getattr(other, kind).rate(now, _EVIDENCE / 2)) is not None
        ]
        return len(others) >= 2 and rate * _MUCH_SLOWER < statistics.median(others)

    def too_slow(self, name: str) -> None:
        """Do without it for a while."""
        with self._lock:
            self._rest(self._node(name), "much slower than the other nodes", _SLOW_REST)

    def measured(self, name: str, nbytes: int, seconds: float, *, stored: bool) -> None:
        """A request waited so long for so many bytes of it. `stored`: the node had them; otherwise it passed them on,
        and they came no faster than they came to it."""
        with self._lock:
            node = self._node(name)
            (node.stored if stored else node.coming).add(nbytes, seconds, self._clock())

    def _rest(self, node: _Node, why: str, seconds: float) -> None:
        node.trying = False
        node.why = why
        node.rest_until = self._clock() + seconds * random.uniform(0.8, 1.2)  # noqa: S311  jitter

    def state(self, name: str) -> tuple[str, int, float | None]:
        """Why it is passed over ("" if it is not), how many wrong blocks it sent, its speed in bytes/s per request."""
        with self._lock:
            node = self._nodes.get(name)
            if node is None:
                return "", 0, None
            known = node.stored
            return node.why, node.bad_blocks, known.nbytes / known.seconds if known.seconds >= 0.01 else None
