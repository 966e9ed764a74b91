"""Watches one request to another node while its answer comes: how fast, and whether it is worth waiting for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from fusecache.peers.exchange import policy
from fusecache.peers.exchange.dependencies import StripeDependencies, StripeId
from fusecache.peers.exchange.transfer import PeerTransfer
from fusecache.peers.member import Member

_POLL_EVERY = 0.4
"""Seconds between two polls of the request."""
_REPORT_EVERY = 0.2
"""Seconds between two counts of what came: each takes three locks."""


class ArrivalRecorder(Protocol):
    """Where a monitor reports what came."""

    def record_arrival(self, member: Member, nbytes: int, seconds: float, *, stored: bool) -> None:
        """A request waited so long for so many bytes of a node; `stored`: the node had them when it was asked."""
        ...


class TransferMonitor:
    """The observer and the receiver of one request (fusecache.peers.transport.observer). Used by one thread.

    The time that counts as the node's runs from `_reported_at`, the last report:

    | What happens | Effect |
    |---|---|
    | `node_waiting`: the node says that it waits itself | its time begins anew |
    | the first bytes, after such a word | its time begins anew |
    | `end_block` of a node that had not stored everything | its clock stops |
    | `begin_block` | its clock goes on |
    | a report: every _REPORT_EVERY, at polls and at the end | bytes and time so far are counted |
    """

    def __init__(
        self,
        member: Member,
        transfer: PeerTransfer,
        stripe: StripeId,
        *,
        dependencies: StripeDependencies,
        recorder: ArrivalRecorder,
        poll_request: Callable[[float], str | None],
    ) -> None:
        """`poll_request` gets the seconds since the node was last heard of, and says why not to wait any longer; None:
        there is reason to wait."""
        self.all_stored = False
        """The node had all blocks when it began to answer."""
        self._member = member
        self._transfer = transfer
        self._stripe = stripe
        self._dependencies = dependencies
        self._recorder = recorder
        self._poll_request = poll_request
        self._is_node_waiting = self._has_begun = self._is_between_blocks = False
        self._received_bytes = self._reported_bytes = 0
        self._block_ended_at = 0.0
        self._reported_at = self._heard_at = self._polled_at = time.monotonic()

    def answered(self, *, all_stored: bool) -> None:
        """The node begins to send."""
        self.all_stored = all_stored

    def report_progress(self) -> None:
        """Count what came since the last report, and the time that it took."""
        now = time.monotonic()
        seconds = (self._block_ended_at if self._is_between_blocks else now) - self._reported_at
        self._recorder.record_arrival(
            self._member, self._received_bytes - self._reported_bytes, seconds, stored=self.all_stored
        )
        self._reported_bytes, self._reported_at, self._block_ended_at = self._received_bytes, now, now

    # -- blocks

    def begin_block(self, checksum: int) -> None:
        """A block begins to come. It is not the node's slowness that it had to wait for it itself: when nodes start
        together, one whose connection to the origin lost a packet was called slow by all the others."""
        if self._is_between_blocks:
            self._is_between_blocks = False
            self._reported_at += time.monotonic() - self._block_ended_at
        self._transfer.begin_block(checksum)

    def write(self, view: memoryview) -> None:
        """Pass bytes of the block on to the flight's sink."""
        self._received_bytes += len(view)
        self._transfer.sink.write(view)

    def end_block(self) -> bool:
        """The block is whole; returns whether it has the checksum that its sender announced."""
        if not self._transfer.end_block():
            return False
        now = time.monotonic()
        if now - self._reported_at > _REPORT_EVERY:
            self.report_progress()
        self._block_ended_at, self._is_between_blocks = now, not self.all_stored
        return True

    # -- time

    def bytes_arrived(self) -> None:
        """Bytes came: it is certain that the rest comes, too."""
        now = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            if self._is_node_waiting:
                self._reported_at = now
        self._heard_at = now
        self._dependencies.mark_arrival_certain(self._stripe, now)

    def node_waiting(self, age: float) -> None:
        """The node waits for others, or the origin, which were heard of `age` seconds ago: that is not its slowness."""
        now = time.monotonic()
        self._is_node_waiting = True
        self._reported_at = now
        self._heard_at = max(self._heard_at, now - age)
        self._dependencies.mark_arrival_certain(self._stripe, self._heard_at)

    def poll(self) -> str | None:
        """Ask the request now and then whether to wait on; returns why not, or None."""
        now = time.monotonic()
        if now - self._polled_at < _POLL_EVERY:
            return None
        self._polled_at = now
        if self._has_begun or now - self._reported_at > policy.NOTICE_WITHIN:
            self.report_progress()
        return self._poll_request(now - self._heard_at)
