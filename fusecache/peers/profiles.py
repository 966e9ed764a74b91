"""Recordings of how models are read, among the nodes of a cluster: small files that the loader makes and follows.

The nodes first in the ranking of a model's id are where its recording is looked for, and where it is brought: who made
one asks them for it, saying that it has it, and those that have none come and take it. So there are GETs only, and
nobody keeps what was pushed at it.
"""

from __future__ import annotations

import logging
import threading
import time

from fusecache.peers.errors import PeerError
from fusecache.peers.exchange.block_source import MembershipView
from fusecache.peers.member import Member
from fusecache.peers.membership.placement import rank_members
from fusecache.peers.transport.client import PeerClient
from fusecache.prefetch.profiles.access_profile import ProfileError, unpack_profile
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.types import ObjectId

_log = logging.getLogger(__name__)

_HOME_NODES = 3
_QUERY_TIMEOUT = 1.0
"""Seconds for all of them together."""
_MAX_CONCURRENT_FETCHES = 4
"""Recordings taken from other nodes at a time; an offer beyond that is passed over."""


class PeerProfiles:
    """See loader.Others; `given` and `offered` are for the server. Thread-safe. `name` is this node's."""

    def __init__(
        self, own_name: str, members: MembershipView, client: PeerClient, profile_store: ProfileStore
    ) -> None:
        self._own_name = own_name
        self._members = members
        self._client = client
        self._profile_store = profile_store
        self._fetch_slots = threading.BoundedSemaphore(_MAX_CONCURRENT_FETCHES)

    def _home_nodes(self, name: str) -> list[Member]:
        found = rank_members(ObjectId(name), -1, self._members.members(), _HOME_NODES + 1)
        return [member for member in found if member.name != self._own_name][:_HOME_NODES]

    def _query_home_nodes(self, name: str, has_profile: bool) -> bytes | None:
        until = time.monotonic() + _QUERY_TIMEOUT
        for member in self._home_nodes(name):
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                data = self._client.request_profile(member.url, name, left, has_profile=has_profile)
            except PeerError as error:
                _log.debug("node %s tells no recording: %s", member.name, error)
                continue
            if data is not None and not has_profile:
                return data
        return None

    def find_profile(self, name: str) -> bytes | None:
        """See loader.Others."""
        return self._query_home_nodes(name, has_profile=False)

    def offer_profile(self, name: str) -> None:
        """See loader.Others."""
        self._query_home_nodes(name, has_profile=True)

    def load_profile(self, name: str) -> bytes | None:
        """What this node has. Does disk I/O."""
        return self._profile_store.load_profile(name)

    def fetch_offered(self, name: str, node: str) -> None:
        """Another node says that it has what this one has not: take it. Blocks; bounded by a deadline."""
        url = next((member.url for member in self._members.members() if member.name == node), None)
        if url is None or node == self._own_name or not self._fetch_slots.acquire(blocking=False):
            return
        try:
            data = self._client.request_profile(url, name, _QUERY_TIMEOUT)
            if data is not None and unpack_profile(data).model_id == name:
                self._profile_store.save_profile(name, data)
        except (PeerError, ProfileError) as error:
            _log.warning("the recording that node %s offers is passed over: %s", node, error)
        finally:
            self._fetch_slots.release()
