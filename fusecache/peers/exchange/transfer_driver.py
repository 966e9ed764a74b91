"""Performs the actions of a StripeRequest with real requests to other nodes, and reports to it what came of them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field

from fusecache.errors import CancelledReadError, UnavailableError
from fusecache.peers.errors import (
    PeerBadBlockError,
    PeerBusyError,
    PeerConnectTimeoutError,
    PeerError,
    PeerMissError,
    PeerRedirectError,
    PeerRefusedError,
    TransferAbandonedError,
)
from fusecache.peers.exchange.state import ExchangeState
from fusecache.peers.exchange.stripe_request import (
    Abandon,
    Action,
    Ask,
    Continue,
    Done,
    GiveUp,
    Hedge,
    ReadOrigin,
    StripeRequest,
    SwitchTo,
    Wait,
)
from fusecache.peers.exchange.transfer import PeerTransfer
from fusecache.peers.exchange.transfer_monitor import TransferMonitor
from fusecache.peers.member import Member
from fusecache.peers.transport.client import IncomingBlocks, PeerClient
from fusecache.peers.transport.wire import MAX_REQUEST_DEADLINE, BlockRequest

_log = logging.getLogger(__name__)

_CANCEL_POLL = 0.25
"""Seconds between looks at whether a flight that waits for a busy node is over."""


@dataclass
class _PeerAnswer:
    """A request to one node, and the answer once it has begun; leaving `stack` ends both."""

    ask: Ask
    monitor: TransferMonitor
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    incoming: IncomingBlocks | None = None


class TransferDriver:
    """Brings the blocks of one flight from other nodes. Used by the flight's thread only.

    While the client waits for bytes it polls the monitor, and the monitor polls the request. If that wants something
    other than to wait on, the driver notes the action in `_interruption`, the client stops with TransferAbandonedError,
    and the driver performs the action. A hedge is sent from within the poll; its answer waits in `_hedge` until then.
    """

    def __init__(
        self, state: ExchangeState, client: PeerClient, request: StripeRequest, transfer: PeerTransfer
    ) -> None:
        self._state = state
        self._client = client
        self._request = request
        self._transfer = transfer
        first = state.rankings.stripe_of(transfer.next_block, transfer.block_size)
        self._stripe = (transfer.version.id, first)
        self._interruption: Action | None = None
        self._hedge: _PeerAnswer | None = None

    def run(self) -> ReadOrigin | None:
        """Bring the blocks; returns None when all have arrived, or how to read the rest from the origin. Blocks. Raises
        CancelledReadError, UnavailableError when the deadline is over, and what the sink raises."""
        action = self._request.start()
        while True:
            match action:
                case Ask():
                    action = self._perform_ask(action)
                case Wait(seconds):
                    self._pause(seconds)
                    action = self._request.waited()
                case ReadOrigin():
                    return action
                case Done():
                    return None
                case GiveUp(is_cancelled):
                    if is_cancelled:
                        raise CancelledReadError(f"{self._transfer.version.key}: the reader went away")
                    raise UnavailableError(
                        f"{self._transfer.version.key}: not all bytes came before the deadline"
                    )
                case _:
                    raise AssertionError(f"{action} outside of a poll")

    def _pause(self, seconds: float) -> None:
        until = min(time.monotonic() + seconds, self._transfer.deadline)
        pause = threading.Event()
        while (left := until - time.monotonic()) > 0 and not self._transfer.cancelled():
            pause.wait(min(left, _CANCEL_POLL))

    # -- one request

    def _begin(self, ask: Ask) -> _PeerAnswer:
        """A request that is about to be sent."""
        monitor = TransferMonitor(
            ask.member,
            self._transfer,
            self._stripe,
            dependencies=self._state.dependencies,
            recorder=self,
            poll_request=lambda silent_seconds: self._poll_request(silent_seconds, ask.member),
        )
        answer = _PeerAnswer(ask, monitor)
        if not ask.stored_only:
            # while the node is waited for it gets nothing of this stripe from us, or both would wait for each other
            answer.stack.enter_context(self._state.dependencies.awaiting(self._stripe, ask.member.name))
        return answer

    def _send(self, answer: _PeerAnswer) -> IncomingBlocks:
        """Send the request; returns when the answer begins. Raises PeerError."""
        incoming = self._client.request_blocks(
            answer.ask.member.url,
            self._build_request(answer.ask),
            self._transfer.version.size,
            answer.monitor,
        )
        answer.stack.callback(incoming.close)
        answer.monitor.answered(all_stored=incoming.all_stored)
        answer.incoming = incoming
        return incoming

    def _build_request(self, ask: Ask) -> BlockRequest:
        transfer, state = self._transfer, self._state
        return BlockRequest(
            transfer.version.id,
            transfer.remaining,
            transfer.version,
            transfer.block_size,
            max(0.001, min(MAX_REQUEST_DEADLINE, transfer.deadline - time.monotonic())),
            ask.hops,
            ask.stored_only,
            ask.failed_nodes,
            ask.no_redirect,
            urgent=transfer.is_urgent,
            unsent_bytes=state.outgoing.unsent_bytes,
            receive_rate=round(state.traffic.peak_throughput() or 0),
            caller=state.own_name,
        )

    def _perform_ask(self, ask: Ask) -> Action:
        """Ask a node, and take what it sends, or what a node that was hedged to sends; returns what to do then."""
        try:
            with self._state.traffic.transfer_in_progress(ask.member.name):
                answer = self._begin(ask)
                while True:
                    with answer.stack:
                        action = self._receive(answer)
                    self._transfer.restart_open_block()
                    if not isinstance(action, SwitchTo):
                        return action
                    assert self._hedge is not None
                    answer, self._hedge = self._hedge, None
        finally:
            if self._hedge is not None:
                self._hedge.stack.close()
            self._state.dependencies.forget_arrival(self._stripe)

    def _receive(self, answer: _PeerAnswer) -> Action:
        """Have the request sent, if it was not yet, and take all blocks; returns what to do then."""
        member = answer.ask.member
        try:
            if answer.incoming is None:
                began = time.monotonic()
                self._send(answer)
                self._state.members.mark_heard(member.name)
                self._state.traffic.record_first_byte(member.name, time.monotonic() - began)
                self._request.answered()
            assert answer.incoming is not None
            answer.incoming.receive_into(answer.monitor)
        except TransferAbandonedError as error:
            action, self._interruption = self._interruption, None
            assert action is not None
            if isinstance(action, Abandon):
                return self._report_failure(member, error)
            if isinstance(action, SwitchTo) and action.is_substitute:
                _log.info("node %s is slow: %s goes on", member.name, action.member.name)
            return action
        except PeerError as error:
            return self._report_error(member, error)
        finally:
            answer.monitor.report_progress()
        return self._request.completed()

    # -- what came of it

    def _report_error(self, member: Member, error: PeerError) -> Action:
        """Tell the request why a node did not give what it was asked for; returns what to do then."""
        if isinstance(error, PeerBusyError):
            self._state.traffic.count_busy_answer()
            return self._request.busy(error.retry_after)
        if isinstance(error, PeerRedirectError):
            action = self._request.redirected(self._member_at(error.url))
            if isinstance(action, Ask) and action.hops:
                self._state.traffic.count_redirect()
            return action
        if isinstance(error, PeerMissError):
            return self._request.missed()
        if isinstance(error, PeerBadBlockError):
            self._state.members.mark_suspect(member.name)
            self._state.traffic.count_bad_block(member.name)
            if self._request.counts_against_sender:
                self._state.traffic.count_error(member.name)
            _log.warning(
                "node %s (%s) sent wrong bytes for block %d of %s: it is avoided; check its memory and disk",
                member.name,
                member.url,
                self._transfer.next_block,
                self._transfer.version.key,
            )
            return self._request.sent_bad_block()
        if isinstance(error, PeerConnectTimeoutError):
            self._state.members.mark_suspect(member.name)
            is_own_fault = self._request.counts_against_sender
            action = self._request.connect_timed_out(
                str(error), is_alive=self._state.members.is_alive(member.name)
            )
            if is_own_fault and not (isinstance(action, Ask) and action.is_reconnect):
                self._log_failure(member, error)
            return action
        return self._report_failure(member, error)

    def _report_failure(self, member: Member, error: PeerError) -> Action:
        self._state.members.mark_suspect(member.name)
        if self._request.counts_against_sender:
            self._log_failure(member, error)
        return self._request.failed(str(error))

    def _log_failure(self, member: Member, error: PeerError) -> None:
        self._state.traffic.count_error(member.name)
        if self._state.breaker.describe_node(member.name)[0] != str(error):
            log = _log.warning if isinstance(error, PeerRefusedError) else _log.info
            log("node %s did not give its blocks: %s", member.name, error)

    def _member_at(self, url: str) -> Member | None:
        for member in self._state.members.members():
            if url == member.url or url.startswith(member.url + "/"):
                return member
        return None

    def record_arrival(self, member: Member, nbytes: int, seconds: float, *, stored: bool) -> None:
        """Count what came from a node, and how long it took."""
        self._state.speeds.record_transfer(member.name, nbytes, seconds, stored=stored)
        if nbytes:
            self._state.members.mark_heard(member.name)
            self._state.traffic.count_received(member.name, nbytes)

    # -- while an answer is waited for

    def _poll_request(self, silent_seconds: float, member: Member) -> str | None:
        """Why not to wait for a node any longer; None: wait. May send a hedge, and wait for its answer: then it is that
        answer's monitor that polls."""
        action = self._request.polled(silent_seconds, is_alive=self._state.members.is_alive(member.name))
        while isinstance(action, Hedge):
            action = self._perform_hedge(action.ask)
        return self._interrupt(action)

    def _interrupt(self, action: Action) -> str | None:
        if isinstance(action, Continue):
            return None
        self._interruption = action
        return action.reason if isinstance(action, Abandon) else "something else is to be done"

    def _perform_hedge(self, ask: Ask) -> Action:
        """Ask another node for what is left, too; returns what to do then."""
        hedge = self._begin(ask)
        try:
            self._send(hedge)
        except PeerError as error:
            hedge.stack.close()
            _log.debug("node %s does not stand in: %s", ask.member.name, error)
            action, self._interruption = self._interruption, None
            return action if isinstance(action, GiveUp) else self._request.hedge_failed()
        except BaseException:
            hedge.stack.close()
            raise
        self._state.traffic.count_hedge()
        self._hedge = hedge
        return self._request.hedge_answered()
