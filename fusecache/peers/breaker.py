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
class _Node:
    failures: int = 0
    rest_until: float = 0.0
    trying: bool = False
    """One request is out to see whether the node is back."""
    bad_blocks: int = 0
    why: str = ""
    nbytes: float = 0.0
    seconds: float = 0.0
    measured: float = field(default_factory=time.monotonic)
    faded: float = field(default_factory=time.monotonic)
    busy_since: float = field(default_factory=time.monotonic)
    """Since when requests wait for it without a long pause."""


class Breakers:
    """One for all nodes. Thread-safe; the lock is a leaf. `clock` is like time.monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._nodes: dict[str, _Node] = {}

    def _node(self, name: str) -> _Node:
        now = self._clock()
        return self._nodes.setdefault(name, _Node(measured=now, faded=now, busy_since=now))

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
            if node is None:
                return False
            self._fade(node, now)
            others = []
            for other_name, other in self._nodes.items():
                self._fade(other, now)
                if other_name != name and other.seconds >= _EVIDENCE / 2:
                    others.append(other.nbytes / other.seconds)
            if node.seconds < _EVIDENCE or now - node.busy_since < _EVIDENCE or len(others) < 2:
                return False
            return node.nbytes / node.seconds * _MUCH_SLOWER < statistics.median(others)

    def too_slow(self, name: str) -> None:
        """Do without it for a while."""
        with self._lock:
            self._rest(self._node(name), "much slower than the other nodes", _SLOW_REST)

    def measured(self, name: str, nbytes: int, seconds: float) -> None:
        """A request waited so long for so many bytes of it."""
        with self._lock:
            node, now = self._node(name), self._clock()
            if now - node.measured > _PAUSE:
                node.busy_since = now
            self._fade(node, now)
            node.nbytes += nbytes
            node.seconds += seconds
            node.measured = now

    def _rest(self, node: _Node, why: str, seconds: float) -> None:
        node.trying = False
        node.why = why
        node.rest_until = self._clock() + seconds * random.uniform(0.8, 1.2)  # noqa: S311  jitter

    def _fade(self, node: _Node, now: float) -> None:
        keep = 0.5 ** ((now - node.faded) / _WINDOW)
        node.nbytes *= keep
        node.seconds *= keep
        node.faded = now

    def state(self, name: str) -> tuple[str, int, float | None]:
        """Why it is passed over ("" if it is not), how many wrong blocks it sent, its speed in bytes/s per request."""
        with self._lock:
            node = self._nodes.get(name)
            if node is None:
                return "", 0, None
            speed = node.nbytes / node.seconds if node.seconds >= 0.01 else None
            return node.why, node.bad_blocks, speed
