"""A node's knowledge of the other nodes. It is built before the store, and serves nothing."""

from __future__ import annotations

import dataclasses
import secrets
import time

import fusecache
from fusecache.config.peer_settings import PeerSettings
from fusecache.events import EventHub
from fusecache.peers.coverage import PeerCoverage
from fusecache.peers.member import PROTOCOL, NodeInfo
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.outgoing import OutgoingBytes
from fusecache.peers.transport.client import PeerClient
from fusecache.peers.transport.credentials import load_credentials


class PeerDirectory:
    """Which nodes there are (`members`), which node has what (`coverage`), how much this node still has to send
    (`outgoing`), and the `client` that asks the others. The parts are thread-safe. Until a PeerNode runs, there are no
    members."""

    def __init__(self, settings: PeerSettings, *, weight: int, block_size: int, events: EventHub) -> None:
        """`weight`: bytes of cache, which count unless the settings name a weight; `block_size` in bytes. Raises
        ConfigError when the secret or the certificates can't be used."""
        self.name = settings.node
        self.credentials = load_credentials(settings)
        self.members_changed = events.members_changed
        self._own_info = NodeInfo(
            settings.node,
            secrets.token_hex(8),
            max(1, settings.weight or weight),
            settings.tenant,
            PROTOCOL,
            fusecache.__version__,
            time.time(),
        )
        self.members = MembershipTable(self._own_info, events.members_changed)
        self.client = PeerClient(
            settings.node,
            signer=self.credentials.signer,
            tls=self.credentials.client_tls,
            connect_timeout=settings.timeout,
            receive_window=block_size,
        )
        self.coverage = PeerCoverage(settings.node, self.members, self.client)
        self.outgoing = OutgoingBytes()

    def own_info(self) -> NodeInfo:
        """This node's introduction to others, with the time of this moment."""
        return dataclasses.replace(self._own_info, time=time.time())

    def weight_shares(self) -> dict[str, float]:
        """Name of each member -> its share of all weights, which is its share of the stripes."""
        members = self.members.members()
        total = sum(member.weight for member in members)
        return {member.name: member.weight / total for member in members}

    def close(self) -> None:
        """Close the idle connections to other nodes; those in use are closed after use."""
        self.client.close()
