"""What is known of one flight and of one request for it, and what is looked at while a node's answer is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusecache.peers.member import Member
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from fusecache.cluster.exchange import Exchange

_GLANCE = 0.4
"""Seconds between looks around."""
_UNTOLD = 3.0
"""Seconds within which a node that waits itself says so; longer waits are its own slowness."""
_TOLD_EVERY = 0.2
"""Seconds between counts of what came: each takes four locks."""
_HEDGE_EVERY = 1.0
"""Seconds between looks for another holder of what a slow node, or the last of all, is sending."""
_STAND_IN_AFTER = 6.0
"""Seconds after which the node next in order is asked to fetch what a slow one does not bring."""
_STAND_IN_FOR_LOADED = 18.0
"""The same, when its link is as good as the others'. When nodes start together, the one that the origin serves first
has to send to all the others for a while: it was called slow, and stripes came twice from the origin."""


@dataclass
class Flight:
    """The state of one flight: `at` is the next block, `begun` says that some of its bytes were handed over."""

    version: ObjectVersion
    blocks: range
    block_size: int
    deadline: float
    cancelled: Callable[[], bool]
    at: int
    begun: bool = False
    urgent: bool = True
    failed: list[str] = field(default_factory=list)
    may_hedge: Sequence[Member] = ()

    @property
    def left(self) -> range:
        return range(self.at, self.blocks.stop)


class Watch:
    """What one request looks at while it waits; see fusecache.peers.client.Watch."""

    def __init__(self, exchange: Exchange, flight: Flight, member: Member, *, may_hedge: bool) -> None:
        self.member = member
        self.stored = False
        self.nbytes = 0
        self._exchange = exchange
        self._flight = flight
        self._may_hedge = may_hedge
        self._waits = self._begun = self._between = False
        self._told = 0
        self._whole = 0.0
        """When the last block was; `_between`: the next one has not begun to come, and the node may wait for it."""
        self._since = self._heard = self._looked = self._began = time.monotonic()
        self._hedge_at = self._began + _HEDGE_EVERY

    def switch(self, member: Member) -> None:
        """The bytes come from another node now."""
        self.tell()
        self.member = member
        self._may_hedge = False

    def tell(self) -> None:
        """Count what came since the last time."""
        now = time.monotonic()
        seconds = (self._whole if self._between else now) - self._since
        self._exchange.count(self.member, self.nbytes - self._told, seconds, stored=self.stored)
        self._told, self._since, self._whole = self.nbytes, now, now

    def begins(self) -> None:
        """A block begins to come. It is not the node's slowness that it had to wait for it itself: when nodes start
        together, one whose connection to the origin lost a packet was called slow by all the others."""
        if self._between:
            self._between = False
            self._since += time.monotonic() - self._whole

    def landed(self) -> None:
        """A block is whole."""
        now = time.monotonic()
        if now - self._since > _TOLD_EVERY:
            self.tell()
        self._whole, self._between = now, not self.stored

    def came(self) -> None:
        """Bytes came."""
        now = time.monotonic()
        if not self._begun:
            self._begun = True
            if self._waits:
                self._since = now
        self._heard = now
        self._exchange.note_coming(self._flight, now)

    def waits(self, age: float) -> None:
        """The node waits for others, or the origin: that is not its slowness."""
        now = time.monotonic()
        self._waits = True
        self._since = now
        self._heard = max(self._heard, now - age)
        self._exchange.note_coming(self._flight, self._heard)

    def glance(self) -> None:
        """Look around."""
        now = time.monotonic()
        if now - self._looked < _GLANCE:
            return
        self._looked = now
        if self._begun or now - self._since > _UNTOLD:
            self.tell()
        self._exchange.look_around(self._flight, self.member, now - self._heard)
        if not self._may_hedge or now < self._hedge_at:
            return
        slow = self._exchange.breakers.is_slow(self.member.name)
        if not slow and not self._exchange.idle:
            return
        self._hedge_at = now + _HEDGE_EVERY
        self._exchange.hedge(self._flight, self.member, stored_only=True)
        loaded = self._exchange.paces.is_loaded(self.member.name)
        if slow and now - self._began > (_STAND_IN_FOR_LOADED if loaded else _STAND_IN_AFTER):
            self._may_hedge = False
            self._exchange.hedge(self._flight, self.member, stored_only=False)
