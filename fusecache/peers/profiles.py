"""Access profiles of models, among the nodes of a cluster: small files whose format this module does not know.

The nodes first in the ranking of a model's id are the home of its profile. A node that needs one asks them for it. A
node that recorded one asks them, too, and says in the request that it has it: those that have none come and take it. So
there are GETs only, and no node stores what another one pushed at it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from fusecache.peers.errors import PeerError
from fusecache.peers.member import Member
from fusecache.peers.membership.placement import WHOLE_OBJECT, rank_members
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.transport.client import PeerClient
from fusecache.types import ObjectId

_log = logging.getLogger(__name__)

_HOME_NODES = 3
_QUERY_TIMEOUT = 1.0
"""Seconds for all of them together."""
_MAX_CONCURRENT_FETCHES = 4
"""Offered profiles taken from other nodes at a time; an offer beyond that is passed over."""


class ProfileFiles(Protocol):
    """Where this node keeps profiles. Thread-safe; does disk I/O, and raises nothing."""

    def load_profile(self, name: str) -> bytes | None:
        """The profile of this name; None: there is none."""
        ...

    def save_profile(self, name: str, data: bytes) -> None:
        """Keep `data` as the profile of this name."""
        ...


class PeerProfiles:
    """Exchanges profiles with the other nodes: `find_profile` and `offer_profile` are for this node, `load_profile` and
    `fetch_offered` for the server that answers others. Thread-safe: it holds no state but a semaphore.

    `check_profile(data, name)` says why the bytes are not a profile of this name; "": they are one. A profile has at
    most `max_bytes`.
    """

    def __init__(
        self,
        own_name: str,
        members: MembershipTable,
        client: PeerClient,
        *,
        profile_files: ProfileFiles,
        check_profile: Callable[[bytes, str], str],
        max_bytes: int,
    ) -> None:
        self._own_name = own_name
        self._members = members
        self._client = client
        self._profile_files = profile_files
        self._check_profile = check_profile
        self._max_bytes = max_bytes
        self._fetch_slots = threading.BoundedSemaphore(_MAX_CONCURRENT_FETCHES)

    def find_profile(self, name: str) -> bytes | None:
        """The profile of this name that another node has, as that node sent it; None: none was found. Blocks for a
        second at most."""
        return self._query_home_nodes(name, has_profile=False)

    def offer_profile(self, name: str) -> None:
        """Let the home nodes know that this node has the profile. Blocks for a second at most."""
        self._query_home_nodes(name, has_profile=True)

    def load_profile(self, name: str) -> bytes | None:
        """The profile of this name that this node has. Does disk I/O."""
        return self._profile_files.load_profile(name)

    def fetch_offered(self, name: str, node: str) -> None:
        """Take the profile that another node says it has, and keep it if it is one. Blocks for a second at most."""
        url = next((member.url for member in self._members.members() if member.name == node), None)
        if url is None or node == self._own_name or not self._fetch_slots.acquire(blocking=False):
            return
        try:
            data = self._client.request_profile(url, name, _QUERY_TIMEOUT, max_bytes=self._max_bytes)
            reason = "" if data is None else self._check_profile(data, name)
            if reason:
                _log.warning("the profile that node %s offers is passed over: %s", node, reason)
            elif data is not None:
                self._profile_files.save_profile(name, data)
        except PeerError as error:
            # A node that offers a profile and ends is nothing to act on: the profile comes with the next load.
            _log.info("the profile that node %s offers is not to be had: %s", node, error)
        finally:
            self._fetch_slots.release()

    def _query_home_nodes(self, name: str, has_profile: bool) -> bytes | None:
        until = time.monotonic() + _QUERY_TIMEOUT
        for member in self._home_nodes(name):
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                data = self._client.request_profile(
                    member.url, name, left, max_bytes=self._max_bytes, has_profile=has_profile
                )
            except PeerError as error:
                _log.debug("node %s gives no profile: %s", member.name, error)
                continue
            if data is not None and not has_profile:
                return data
        return None

    def _home_nodes(self, name: str) -> list[Member]:
        found = rank_members(ObjectId(name), WHOLE_OBJECT, self._members.members(), _HOME_NODES + 1)
        return [member for member in found if member.name != self._own_name][:_HOME_NODES]
