"""Which nodes are not worth a request for a while: a circuit breaker per node, and a comparison of their speeds."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

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
class _BreakerState:
    failures: int = 0
    bad_blocks: int = 0
    reason: str = ""
    """Why the breaker is open; "": it is closed."""
    avoided_until: float = 0.0
    is_on_trial: bool = False


class CircuitBreaker:
    """Tells for every node whether a request to it is worth while. Thread-safe: `_lock` guards the states and is a
    leaf. `clock` is like time.monotonic, `uniform` like random.uniform.

    | State of a node | What happens | Next state |
    |---|---|---|
    | closed: any request may go out | `request_failed`, `bad_block_received`, `avoid_slow_node` | resting |
    | resting: no request | some seconds pass, more with each failure in a row | rested |
    | rested | `begin_trial` | on trial |
    | on trial: no further request | `request_succeeded` | closed |
    | | `request_undecided` | rested |
    | | `request_failed`, `bad_block_received`, `avoid_slow_node` | resting |

    A request that began before the node's failure may still succeed, which closes the breaker from any state.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock = clock
        self._uniform = uniform
        self._lock = threading.Lock()
        self._states: dict[str, _BreakerState] = {}

    def may_admit(self, name: str) -> bool:
        """Whether a request to the node could go out now. Changes nothing."""
        with self._lock:
            return self._may_admit_locked(self._states.get(name))

    def begin_trial(self, name: str) -> bool:
        """Call this just before a request is sent: returns whether it may be. To a node that has rested it is the
        trial, and no other request may go there until the outcome of this one is reported."""
        with self._lock:
            state = self._states.get(name)
            if not self._may_admit_locked(state):
                return False
            if state is not None and state.reason:
                state.is_on_trial = True
            return True

    def _may_admit_locked(self, state: _BreakerState | None) -> bool:
        if state is None or not state.reason:
            return True
        return not state.is_on_trial and self._clock() >= state.avoided_until

    def request_succeeded(self, name: str) -> None:
        """The node gave what it was asked for, or a redirect."""
        with self._lock:
            state = self._state_locked(name)
            state.failures = 0
            state.is_on_trial = False
            state.reason = ""

    def request_undecided(self, name: str) -> None:
        """A request went out, and its outcome says nothing about the node."""
        with self._lock:
            self._state_locked(name).is_on_trial = False

    def request_failed(self, name: str, reason: str) -> None:
        """The node did not answer, or broke off."""
        with self._lock:
            state = self._state_locked(name)
            state.failures += 1
            seconds = min(_LONGEST_AVOIDANCE, _FIRST_AVOIDANCE * 2.0 ** min(state.failures - 1, 8))
            self._avoid_node_locked(state, reason, seconds)

    def bad_block_received(self, name: str) -> None:
        """A block that the node sent did not have its checksum."""
        with self._lock:
            state = self._state_locked(name)
            state.bad_blocks += 1
            self._avoid_node_locked(state, "sent wrong bytes", _BAD_BLOCK_AVOIDANCE * state.bad_blocks)

    def avoid_slow_node(self, name: str) -> None:
        """Another node went on with what this one sent too slowly."""
        with self._lock:
            self._avoid_node_locked(
                self._state_locked(name), "much slower than the other nodes", _SLOW_AVOIDANCE
            )

    def _state_locked(self, name: str) -> _BreakerState:
        return self._states.setdefault(name, _BreakerState())

    def _avoid_node_locked(self, state: _BreakerState, reason: str, seconds: float) -> None:
        state.is_on_trial = False
        state.reason = reason
        state.avoided_until = self._clock() + seconds * self._uniform(0.8, 1.2)

    def describe_node(self, name: str) -> tuple[str, int]:
        """Why the node is passed over ("": it is not), and how many wrong blocks it has sent."""
        with self._lock:
            state = self._states.get(name)
            return ("", 0) if state is None else (state.reason, state.bad_blocks)


@dataclass
class _TransferSpeed:
    """How fast bytes of one kind come from one node. Both sums are halved every _SPEED_HALF_LIFE."""

    nbytes: float = 0.0
    seconds: float = 0.0
    """Summed over the requests that waited for the bytes."""
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

    def measured_rate(self, now: float, evidence: float) -> float | None:
        """Bytes per second; None as long as less than `evidence` seconds were measured."""
        self.decay_to(now)
        if self.seconds < evidence or now - self.busy_since < evidence:
            return None
        return self.nbytes / self.seconds


class SpeedComparison:
    """How fast each node sends, and which one is much slower than its fellows. Thread-safe: `_lock` guards the sums and
    is a leaf. `clock` is like time.monotonic.

    Blocks that a node had stored are compared with stored ones, blocks that it passed on with those that others passed
    on: these came no faster than they came to the node itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stored_speeds: dict[str, _TransferSpeed] = {}
        self._relayed_speeds: dict[str, _TransferSpeed] = {}

    def record_transfer(self, name: str, nbytes: int, seconds: float, *, stored: bool) -> None:
        """A request waited so many seconds for so many bytes from the node; `stored`: the node had them."""
        with self._lock:
            speeds = self._stored_speeds if stored else self._relayed_speeds
            speeds.setdefault(name, _TransferSpeed()).add_transfer(nbytes, seconds, self._clock())

    def is_slow(self, name: str) -> bool:
        """Whether the node is much slower than the median of at least two others; False while too little was
        measured."""
        with self._lock:
            now = self._clock()
            return any(
                self._is_slow_locked(speeds, name, now)
                for speeds in (self._stored_speeds, self._relayed_speeds)
            )

    def _is_slow_locked(self, speeds: dict[str, _TransferSpeed], name: str, now: float) -> bool:
        own = speeds.get(name)
        rate = None if own is None else own.measured_rate(now, _MIN_EVIDENCE)
        if rate is None:
            return False
        others = [
            found
            for other, speed in speeds.items()
            if other != name and (found := speed.measured_rate(now, _MIN_EVIDENCE / 2)) is not None
        ]
        return len(others) >= 2 and rate * _SLOW_FACTOR < statistics.median(others)

    def stored_rate(self, name: str) -> float | None:
        """Bytes per second and request that the node gives of what it has stored; None: nothing is known."""
        with self._lock:
            speed = self._stored_speeds.get(name)
            return speed.nbytes / speed.seconds if speed is not None and speed.seconds >= 0.01 else None
