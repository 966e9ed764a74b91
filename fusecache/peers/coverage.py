"""How much the other nodes have of which object, as they say themselves (GET /v1/objects)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import trio

from fusecache.errors import FusecacheError
from fusecache.peers.membership.placement import WHOLE_OBJECT, rank_members
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.transport.client import PeerClient
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_POLL_TIMEOUT = 5.0
"""Seconds in which a node has to list its objects."""


class PeerCoverage:
    """The other nodes' objects as of the last poll. `poll` runs in the trio thread; any thread asks: each poll replaces
    the answers as a whole, so there is no lock."""

    def __init__(self, own_name: str, members: MembershipTable, client: PeerClient) -> None:
        self._own_name = own_name
        self._members = members
        self._client = client
        self._bytes_by_node: Mapping[str, Mapping[ObjectId, int]] = {}

    @property
    def bytes_by_node(self) -> Mapping[str, Mapping[ObjectId, int]]:
        """Node -> object -> bytes that the node has of it. Nodes that did not answer are missing."""
        return self._bytes_by_node

    async def poll(self) -> None:
        """Ask all other nodes for their objects, at the same time; takes some seconds at most. Raises nothing."""
        found: dict[str, Mapping[ObjectId, int]] = {}

        async def ask(name: str, url: str) -> None:
            request = functools.partial(self._client.request_json, url, "/v1/objects", _POLL_TIMEOUT)
            try:
                answer = await trio.to_thread.run_sync(request)
                found[name] = {ObjectId(str(item["id"])): int(item["cached_bytes"]) for item in answer}
            except (FusecacheError, TypeError, KeyError, ValueError) as error:
                _log.debug("node %s does not tell what it has: %s", name, error)

        async with trio.open_nursery() as nursery:
            for member in self._members.members():
                if member.name != self._own_name:
                    nursery.start_soon(ask, member.name, member.url)
        self._bytes_by_node = found

    def is_kept_elsewhere(self, version: ObjectVersion) -> bool:
        """Whether another node has all of this object and is to keep it longer than this one, so that evicting it here
        loses nothing. Quick; from any thread."""
        coverage = self._bytes_by_node
        for member in rank_members(version.id, WHOLE_OBJECT, self._members.members()):
            if member.name == self._own_name:
                return False
            if coverage.get(member.name, {}).get(version.id, 0) >= version.size:
                return True
        return False
