"""Recordings of how models are read, among the nodes of a cluster: small files that the loader makes and follows.

The nodes first in the ranking of a model's id are where its recording is looked for, and where it is brought: who made
one asks them for it, saying that it has it, and those that have none come and take it. So there are GETs only, and
nobody keeps what was pushed at it.
"""

from __future__ import annotations

import logging
import threading
import time

from fusecache.cluster.exchange import Members
from fusecache.loader.recording import RecordingError, unpack
from fusecache.peers.client import PeerClient
from fusecache.peers.errors import PeerError
from fusecache.peers.member import Member
from fusecache.peers.placement import ranking
from fusecache.store.orders import Orders
from fusecache.types import ObjectId

_log = logging.getLogger(__name__)

_HOMES = 3
_PATIENCE = 1.0
"""Seconds for all of them together."""
_TAKING = 4
"""Recordings taken from other nodes at a time; an offer beyond that is passed over."""


class SharedOrders:
    """See loader.Others; `given` and `offered` are for the server. Thread-safe. `name` is this node's."""

    def __init__(self, name: str, members: Members, client: PeerClient, shelf: Orders) -> None:
        self._name = name
        self._members = members
        self._client = client
        self._shelf = shelf
        self._taking = threading.BoundedSemaphore(_TAKING)

    def _homes(self, name: str) -> list[Member]:
        found = ranking(ObjectId(name), -1, self._members.members(), _HOMES + 1)
        return [member for member in found if member.name != self._name][:_HOMES]

    def _ask(self, name: str, have: bool) -> bytes | None:
        until = time.monotonic() + _PATIENCE
        for member in self._homes(name):
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                data = self._client.order(member.url, name, left, have=have)
            except PeerError as error:
                _log.debug("node %s tells no recording: %s", member.name, error)
                continue
            if data is not None and not have:
                return data
        return None

    def find(self, name: str) -> bytes | None:
        """See loader.Others."""
        return self._ask(name, have=False)

    def offer(self, name: str) -> None:
        """See loader.Others."""
        self._ask(name, have=True)

    def given(self, name: str) -> bytes | None:
        """What this node has. Does disk I/O."""
        return self._shelf.load(name)

    def offered(self, name: str, node: str) -> None:
        """Another node says that it has what this one has not: take it. Blocks; bounded by a deadline."""
        url = next((member.url for member in self._members.members() if member.name == node), None)
        if url is None or node == self._name or not self._taking.acquire(blocking=False):
            return
        try:
            data = self._client.order(url, name, _PATIENCE)
            if data is not None and unpack(data).model == name:
                self._shelf.save(name, data)
        except (PeerError, RecordingError) as error:
            _log.warning("the recording that node %s offers is passed over: %s", node, error)
        finally:
            self._taking.release()
