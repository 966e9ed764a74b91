"""Whom not to ask for a while: a circuit breaker and a speedometer per node."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_FIRST_AVOIDANCE = 1.0
_LONGEST_AVOIDANCE = 30.0
_BAD_BLOCK_AVOIDANCE = 60.0
"""Seconds without a node that sent wrong bytes, times how often it did."""
_SLOW_AVOIDANCE = 20.0
_SPEED_HALF_LIFE = 8.0
"""Seconds after which half of what is known of a node's speed is forgotten."""
_MIN_EVIDENCE = 4.0
"""Seconds of waiting for a node before it can be called slow, by the clock and summed over requests."""
_LONG_PAUSE = 3.0
_SLOW_FACTOR = 8.0


@dataclass
class _TransferSpeed:
    """How fast bytes of one kind come."""

    nbytes: float = 0.0
    seconds: float = 0.0
    """Summed over the requests that waited for them."""
    decayed_at: float = 0.0
    last_added_at: float = -1e9
    busy_since: float = 0.0
    """Since when requests wait without a long pause."""

    def decay_to(self, now: float) -> None:
        keep = 0.5 ** ((now - self.decayed_at) / _SPEED_HALF_LIFE)
        self.nbytes *= keep
        self.seconds *= keep
        self.decayed_at = now

    def add_transfer(self, nbytes: int, seconds: float, now: float) -> None:
        if now - self.last_added_at > _LONG_PAUSE:
            self.busy_since = now
        self.decay_to(now)
        self.nbytes += nbytes
        self.seconds += seconds
        self.last_added_at = now

    def rate(self, now: float, evidence: float) -> float | None:
        self.decay_to(now)
        if self.seconds < evidence or now - self.busy_since < evidence:
            return None
        return self.nbytes / self.seconds


@dataclass
class _NodeHealth:
    failures: int = 0
    avoided_until: float = 0.0
    is_on_trial: bool = False
    """One request is out to see whether the node is back."""
    bad_blocks: int = 0
    reason: str = ""
    stored: _TransferSpeed = field(default_factory=lambda: _TransferSpeed())
    coming: _TransferSpeed = field(default_factory=lambda: _TransferSpeed())


class PeerHealth:
    """One for all nodes. Thread-safe; the lock is a leaf. `clock` is like time.monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._nodes: dict[str, _NodeHealth] = {}

    def _health_of_locked(self, name: str) -> _NodeHealth:
        return self._nodes.setdefault(name, _NodeHealth())

    def admit_request(self, name: str) -> bool:
        """Whether the node may be asked. After its rest one request may, until that one's outcome is told."""
        with self._lock:
            node = self._nodes.get(name)
            if node is None or not node.reason:
                return True
            if self._clock() < node.avoided_until or node.is_on_trial:
                return False
            node.is_on_trial = True
            return True

    def request_succeeded(self, name: str) -> None:
        """It gave what it was asked for."""
        with self._lock:
            node = self._health_of_locked(name)
            node.failures = 0
            node.is_on_trial = False
            node.reason = ""

    def request_undecided(self, name: str) -> None:
        """It was asked, and what came of it says nothing of the node."""
        with self._lock:
            self._health_of_locked(name).is_on_trial = False

    def request_failed(self, name: str, reason: str) -> None:
        """It did not answer, or broke off."""
        with self._lock:
            node = self._health_of_locked(name)
            node.failures += 1
            self._avoid_node_locked(
                node, reason, min(_LONGEST_AVOIDANCE, _FIRST_AVOIDANCE * 2.0 ** min(node.failures - 1, 8))
            )

    def bad_block_received(self, name: str) -> None:
        """A block of it did not have its checksum."""
        with self._lock:
            node = self._health_of_locked(name)
            node.bad_blocks += 1
            self._avoid_node_locked(node, "sent wrong bytes", _BAD_BLOCK_AVOIDANCE * node.bad_blocks)

    def is_slow(self, name: str) -> bool:
        """Whether it is much slower than its fellows, as far as that can be said."""
        with self._lock:
            now = self._clock()
            node = self._nodes.get(name)
            return node is not None and any(
                self._is_slow_locked(node, getattr(node, kind).rate(now, _MIN_EVIDENCE), kind, now)
                for kind in ("stored", "coming")
            )

    def _is_slow_locked(self, node: _NodeHealth, rate: float | None, kind: str, now: float) -> bool:
        if rate is None:
            return False
        others = [
            found
            for other in self._nodes.values()
            if other is not node and (found := getattr(other, kind).rate(now, _MIN_EVIDENCE / 2)) is not None
        ]
        return len(others) >= 2 and rate * _SLOW_FACTOR < statistics.median(others)

    def avoid_slow_node(self, name: str) -> None:
        """Do without it for a while."""
        with self._lock:
            self._avoid_node_locked(
                self._health_of_locked(name), "much slower than the other nodes", _SLOW_AVOIDANCE
            )

    def record_transfer(self, name: str, nbytes: int, seconds: float, *, stored: bool) -> None:
        """A request waited so long for so many bytes of it. `stored`: the node had them; otherwise it passed them on,
        and they came no faster than they came to it."""
        with self._lock:
            node = self._health_of_locked(name)
            (node.stored if stored else node.coming).add_transfer(nbytes, seconds, self._clock())

    def _avoid_node_locked(self, node: _NodeHealth, reason: str, seconds: float) -> None:
        node.is_on_trial = False
        node.reason = reason
        node.avoided_until = self._clock() + seconds * random.uniform(0.8, 1.2)  # noqa: S311  jitter

    def describe_node(self, name: str) -> tuple[str, int, float | None]:
        """Why it is passed over ("" if it is not), how many wrong blocks it sent, its speed in bytes/s per request."""
        with self._lock:
            node = self._nodes.get(name)
            if node is None:
                return "", 0, None
            known = node.stored
            return (
                node.reason,
                node.bad_blocks,
                known.nbytes / known.seconds if known.seconds >= 0.01 else None,
            )
