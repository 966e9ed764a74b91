"""What is known of one flight and of one request for it, and what is looked at while a node's answer is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusecache.fetch.block_source import BlockSink
from fusecache.peers.member import Member
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from fusecache.peers.exchange.block_source import PeerBlockSource

_POLL_EVERY = 0.4
"""Seconds between looks around."""
_NOTICE_WITHIN = 3.0
"""Seconds within which a node that waits itself says so; longer waits are its own slowness."""
_REPORT_EVERY = 0.2
"""Seconds between counts of what came: each takes four locks."""
_HEDGE_EVERY = 1.0
"""Seconds between looks for another holder of what a slow node, or the last of all, is sending."""
_SUBSTITUTE_AFTER = 6.0
"""Seconds after which the node next in order is asked to fetch what a slow one does not bring."""
_SUBSTITUTE_LOADED_AFTER = 18.0
"""The same, when its link is as good as the others'. When nodes start together, the one that the origin serves first
has to send to all the others for a while: it was called slow, and stripes came twice from the origin."""


@dataclass
class PeerTransfer:
    """The state of one flight: `at` is the next block, `begun` says that some of its bytes were handed over."""

    version: ObjectVersion
    blocks: range
    block_size: int
    deadline: float
    cancelled: Callable[[], bool]
    next_block: int
    sink: BlockSink
    has_partial_block: bool = False
    is_urgent: bool = True
    failed_nodes: list[str] = field(default_factory=list)
    substitutes: Sequence[Member] = ()

    @property
    def remaining(self) -> range:
        return range(self.next_block, self.blocks.stop)


class TransferMonitor:
    """What one request looks at while it waits; see fusecache.peers.transport.client.Watch."""

    def __init__(
        self, block_source: PeerBlockSource, transfer: PeerTransfer, member: Member, *, may_hedge: bool
    ) -> None:
        self.member = member
        self.all_stored = False
        self.received_bytes = 0
        self._block_source = block_source
        self._transfer = transfer
        self._may_hedge = may_hedge
        self._is_node_waiting = self._has_begun = self._is_between_blocks = False
        self._reported_bytes = 0
        self._block_ended_at = 0.0
        """When the last block was; `_between`: the next one has not begun to come, and the node may wait for it."""
        self._reported_at = self._heard_at = self._polled_at = self._started_at = time.monotonic()
        self._next_hedge_at = self._started_at + _HEDGE_EVERY

    def switch_member(self, member: Member) -> None:
        """The bytes come from another node now."""
        self.report_progress()
        self.member = member
        self._may_hedge = False

    def report_progress(self) -> None:
        """Count what came since the last time."""
        now = time.monotonic()
        seconds = (self._block_ended_at if self._is_between_blocks else now) - self._reported_at
        self._block_source.count_received(
            self.member, self.received_bytes - self._reported_bytes, seconds, stored=self.all_stored
        )
        self._reported_bytes, self._reported_at, self._block_ended_at = self.received_bytes, now, now

    def block_begun(self) -> None:
        """A block begins to come. It is not the node's slowness that it had to wait for it itself: when nodes start
        together, one whose connection to the origin lost a packet was called slow by all the others."""
        if self._is_between_blocks:
            self._is_between_blocks = False
            self._reported_at += time.monotonic() - self._block_ended_at

    def block_completed(self) -> None:
        """A block is whole."""
        now = time.monotonic()
        if now - self._reported_at > _REPORT_EVERY:
            self.report_progress()
        self._block_ended_at, self._is_between_blocks = now, not self.all_stored

    def bytes_arrived(self) -> None:
        """Bytes came."""
        now = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            if self._is_node_waiting:
                self._reported_at = now
        self._heard_at = now
        self._block_source.mark_arrival_certain(self._transfer, now)

    def node_waiting(self, age: float) -> None:
        """The node waits for others, or the origin: that is not its slowness."""
        now = time.monotonic()
        self._is_node_waiting = True
        self._reported_at = now
        self._heard_at = max(self._heard_at, now - age)
        self._block_source.mark_arrival_certain(self._transfer, self._heard_at)

    def poll(self) -> None:
        """Look around."""
        now = time.monotonic()
        if now - self._polled_at < _POLL_EVERY:
            return
        self._polled_at = now
        if self._has_begun or now - self._reported_at > _NOTICE_WITHIN:
            self.report_progress()
        self._block_source.check_transfer(self._transfer, self.member, now - self._heard_at)
        if not self._may_hedge or now < self._next_hedge_at:
            return
        slow = self._block_source.speeds.is_slow(self.member.name)
        if not slow and not self._block_source.is_mostly_idle:
            return
        self._next_hedge_at = now + _HEDGE_EVERY
        self._block_source.hedge_transfer(self._transfer, self.member, stored_only=True)
        loaded = self._block_source.receiver_rates.has_normal_link(self.member.name)
        if slow and now - self._started_at > (_SUBSTITUTE_LOADED_AFTER if loaded else _SUBSTITUTE_AFTER):
            self._may_hedge = False
            self._block_source.hedge_transfer(self._transfer, self.member, stored_only=False)
