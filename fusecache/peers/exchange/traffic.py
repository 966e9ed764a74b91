"""Counters of what goes between this node and the others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from fusecache.throughput import PeakThroughput


@dataclass
class NodeTraffic:
    """Counters of one node since the start."""

    bytes_in: int = 0
    bytes_out: int = 0
    requests: int = 0
    errors: int = 0
    bad_blocks: int = 0
    first_byte_seconds: float | None = None
    """Seconds until an answer begins, the mean of the last ones."""


@dataclass
class PeerSourceStats:
    """Counters of all nodes together since the start."""

    bytes_from_peers: int = 0
    fallbacks: int = 0
    """Flights that went to the origin though the stripe is another node's."""
    redirects: int = 0
    busy_answers: int = 0
    hedges: int = 0
    traffic_by_node: dict[str, NodeTraffic] = field(default_factory=dict)


class PeerTraffic:
    """Counts requests and bytes. Thread-safe: `_lock` guards all of it and is a leaf. `stats` may be read without it,
    since a counter that is read a moment too early is only a little old."""

    def __init__(self) -> None:
        self.stats = PeerSourceStats()
        self._lock = threading.Lock()
        self._peak_throughput = PeakThroughput()
        self._transfers_in_progress = 0

    @property
    def transfers_in_progress(self) -> int:
        """Requests to other nodes that are under way."""
        return self._transfers_in_progress

    def node_counters(self, name: str) -> NodeTraffic:
        """The counters of a node, to be read."""
        with self._lock:
            return self._counters_locked(name)

    def _counters_locked(self, name: str) -> NodeTraffic:
        return self.stats.traffic_by_node.setdefault(name, NodeTraffic())

    @contextlib.contextmanager
    def transfer_in_progress(self, name: str) -> Iterator[None]:
        """While this lasts, a request to the node is under way."""
        with self._lock:
            self._transfers_in_progress += 1
            self._counters_locked(name).requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._transfers_in_progress -= 1

    def peak_throughput(self) -> float | None:
        """Bytes per second that the other nodes gave in their best second of late; None: nothing is known."""
        with self._lock:
            return self._peak_throughput.bytes_per_second(time.monotonic())

    def count_received(self, name: str, nbytes: int) -> None:
        """So many bytes of blocks came from the node."""
        with self._lock:
            self.stats.bytes_from_peers += nbytes
            self._peak_throughput.add_arrival(time.monotonic(), nbytes)
            self._counters_locked(name).bytes_in += nbytes

    def count_sent(self, name: str, nbytes: int) -> None:
        """So many bytes of blocks went to the node."""
        with self._lock:
            self._counters_locked(name).bytes_out += nbytes

    def count_error(self, name: str) -> None:
        """The node did not give what it was asked for, and it is its own fault."""
        with self._lock:
            self._counters_locked(name).errors += 1

    def count_bad_block(self, name: str) -> None:
        """The node sent a block that did not have its checksum."""
        with self._lock:
            self._counters_locked(name).bad_blocks += 1

    def count_fallback(self) -> None:
        """A flight goes to the origin though the stripe is another node's."""
        with self._lock:
            self.stats.fallbacks += 1

    def count_redirect(self) -> None:
        """A node sent a request on to another one."""
        with self._lock:
            self.stats.redirects += 1

    def count_busy_answer(self) -> None:
        """A node had too much to do."""
        with self._lock:
            self.stats.busy_answers += 1

    def count_hedge(self) -> None:
        """A second request was answered."""
        with self._lock:
            self.stats.hedges += 1

    def record_first_byte(self, name: str, seconds: float) -> None:
        """The node took so long to begin an answer."""
        with self._lock:
            counters = self._counters_locked(name)
            known = counters.first_byte_seconds
            counters.first_byte_seconds = seconds if known is None else 0.8 * known + 0.2 * seconds
