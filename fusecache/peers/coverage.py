"""How fast other nodes would give what is on this node's disk: for `store=auto`, see store/paths.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing

from fusecache.errors import FusecacheError
from fusecache.peers.exchange.block_source import MembershipView, PeerBlockSource
from fusecache.peers.transport.client import PeerClient, RequestTimeout
from fusecache.peers.transport.wire import MAX_REQUEST_BLOCKS, BlockRequest
from fusecache.store.interface import BlockStore
from fusecache.store.tier_placement import is_clearly_slower
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_SAMPLE_SECONDS = 1.0
"""Seconds that a sample takes: a pace is that of a second (store/pace.py)."""
_SAMPLE_TIMEOUT = 2.0
"""Seconds after which a node that is to give a sample is given up."""


class PeerSupplyEstimate:
    """What other nodes give, at what pace. Thread-safe but for `sample`, which one thread calls at a time."""

    def __init__(
        self,
        own_name: str,
        members: MembershipView,
        block_source: PeerBlockSource,
        client: PeerClient,
        store: BlockStore,
    ) -> None:
        self._own_name = own_name
        self._members = members
        self._block_source = block_source
        self._client = client
        self._store = store
        self._fast_coverage: Mapping[str, Mapping[ObjectId, int]] = {}
        store.estimate_peer_throughput = self.estimate_peer_throughput

    def update_coverage(self, fast_coverage: Mapping[str, Mapping[ObjectId, int]]) -> None:
        """What each node has all of, in memory or on a disk that is not slow, with its size in bytes."""
        self._fast_coverage = fast_coverage

    def is_needed(self) -> bool:
        """Whether this node's disk is, or may be, slower than the other nodes. Waits for a measurement of the disk."""
        read = self._store.measured_rates(wait_for_measurement=True).disk_read
        if read is None:
            return False
        pace = self._block_source.peak_throughput()
        return pace is None or is_clearly_slower(read, pace)

    def estimate_peer_throughput(self, version: ObjectVersion) -> float | None:
        """See BlockStore. Only when each stripe's next node has all of it: the origin must not be asked again for what
        is on our disk."""
        pace = self._block_source.peak_throughput()
        quick = self._fast_coverage
        if pace is None or not is_clearly_slower(self._store.measured_rates().disk_read, pace):
            return None
        names = {name for name, objects in quick.items() if version.id in objects}
        if not names:
            return None
        blocks = -(-version.size // self._store.block_size)
        for stripe in range(self._block_source.stripe_of(max(0, blocks - 1), self._store.block_size) + 1):
            order = self._block_source.ranking_of(version.id, stripe)
            asked = next((member.name for member in order if member.name != self._own_name), None)
            if asked not in names:
                return None
        return pace

    def sample_nodes(self) -> None:
        """Find out what the other nodes give, where nothing is known: take something from each, for a moment."""
        urls = {member.name: member.url for member in self._members.members()}
        until = time.monotonic() + _SAMPLE_SECONDS
        for name, objects in self._fast_coverage.items():
            if self._block_source.peak_throughput() is not None or time.monotonic() > until:
                return
            if name in urls and objects:
                largest = max(objects, key=objects.__getitem__)
                try:
                    self._sample_node(urls[name], largest, objects[largest], until)
                except FusecacheError as error:
                    _log.debug("node %s gives no sample: %s", name, error)

    def _sample_node(self, url: str, object_id: ObjectId, nbytes: int, until: float) -> None:
        """Bytes of an object, again and again until then. Raises PeerError."""
        size = self._store.block_size
        blocks = range(min(MAX_REQUEST_BLOCKS, max(1, -(-nbytes // size))))
        while time.monotonic() < until:
            request = BlockRequest(
                object_id, blocks, block_size=size, deadline=_SAMPLE_TIMEOUT, stored_only=True, urgent=False
            )
            with closing(
                self._client.request_blocks(
                    url, request, nbytes, RequestTimeout(url, _SAMPLE_SECONDS + _SAMPLE_TIMEOUT)
                )
            ) as answer:
                for part in answer:
                    if isinstance(part, memoryview):
                        self._block_source.count_discarded(len(part))
                    if time.monotonic() > until:
                        return
