"""How fast other nodes would give what is on this node's disk: for `store=auto`, see store/paths.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing

from fusecache.cluster.exchange import Exchange, Members
from fusecache.errors import FusecacheError
from fusecache.peers.client import Patience, PeerClient
from fusecache.peers.wire import MAX_BLOCKS, BlockRequest
from fusecache.store.interface import BlockStore
from fusecache.store.paths import is_slower
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_SAMPLE = 1.0
"""Seconds that a sample takes: a pace is that of a second (store/pace.py)."""
_SILENT = 2.0
"""Seconds after which a node that is to give a sample is given up."""


class Elsewhere:
    """What other nodes give, at what pace. Thread-safe but for `sample`, which one thread calls at a time."""

    def __init__(
        self, name: str, members: Members, exchange: Exchange, client: PeerClient, store: BlockStore
    ) -> None:
        self._name = name
        self._members = members
        self._exchange = exchange
        self._client = client
        self._store = store
        self._quick: Mapping[str, Mapping[ObjectId, int]] = {}
        store.elsewhere = self.pace_of

    def seen(self, quick: Mapping[str, Mapping[ObjectId, int]]) -> None:
        """What each node has all of, in memory or on a disk that is not slow, with its size in bytes."""
        self._quick = quick

    def matters(self) -> bool:
        """Whether this node's disk is, or may be, slower than the other nodes. Waits for a measurement of the disk."""
        read = self._store.paces(wait=True).read
        if read is None:
            return False
        pace = self._exchange.pace()
        return pace is None or is_slower(read, pace)

    def pace_of(self, version: ObjectVersion) -> float | None:
        """See BlockStore. Only when each stripe's next node has all of it: the origin must not be asked again for what
        is on our disk."""
        pace = self._exchange.pace()
        quick = self._quick
        if pace is None or not is_slower(self._store.paces().read, pace):
            return None
        names = {name for name, objects in quick.items() if version.id in objects}
        if not names:
            return None
        blocks = -(-version.size // self._store.block_size)
        for stripe in range(self._exchange.stripe_of(max(0, blocks - 1), self._store.block_size) + 1):
            order = self._exchange.ranking(version.id, stripe)
            asked = next((member.name for member in order if member.name != self._name), None)
            if asked not in names:
                return None
        return pace

    def sample(self) -> None:
        """Find out what the other nodes give, where nothing is known: take something from each, for a moment."""
        urls = {member.name: member.url for member in self._members.members()}
        until = time.monotonic() + _SAMPLE
        for name, objects in self._quick.items():
            if self._exchange.pace() is not None or time.monotonic() > until:
                return
            if name in urls and objects:
                largest = max(objects, key=objects.__getitem__)
                try:
                    self._take(urls[name], largest, objects[largest], until)
                except FusecacheError as error:
                    _log.debug("node %s gives no sample: %s", name, error)

    def _take(self, url: str, object_id: ObjectId, nbytes: int, until: float) -> None:
        """Bytes of an object, again and again until then. Raises PeerError."""
        size = self._store.block_size
        blocks = range(min(MAX_BLOCKS, max(1, -(-nbytes // size))))
        while time.monotonic() < until:
            request = BlockRequest(
                object_id, blocks, block_size=size, deadline=_SILENT, stored_only=True, urgent=False
            )
            with closing(
                self._client.blocks(url, request, nbytes, Patience(url, _SAMPLE + _SILENT))
            ) as answer:
                for part in answer:
                    if isinstance(part, memoryview):
                        self._exchange.took(len(part))
                    if time.monotonic() > until:
                        return
