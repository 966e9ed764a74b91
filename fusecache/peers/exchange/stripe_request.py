"""The course of one flight through the cluster, as a state machine without I/O: which node is asked for the blocks,
and what follows from its answer.

A driver performs an action, reports what came of it by calling the method of that event, and gets the next action. The
threads of PeerBlockSource drive it with sockets, the simulation in benchmarks/ with simulated ones.

| State | Event | Next state: action |
|---|---|---|
| NEW | `start` | *next node* |
| ASKING | `answered`: the node begins to send | RECEIVING: Continue |
| | `busy` | WAITING: Wait |
| | `redirected` to a node that we know | ASKING: Ask that node |
| | `redirected` to nobody we know, or to ourselves | ASKING: Ask the first node to send them itself |
| | `redirected` although we forbade it, or too often | *nothing from this node* |
| | `missed`: it has not got the blocks, and does not fetch them | *nothing from this node* |
| | `connect_timed_out`, for the first time, and it is alive | ASKING: Ask it again |
| | `connect_timed_out` otherwise | *nothing from this node*; it is avoided |
| ASKING, RECEIVING | `failed` | *nothing from this node*; it is avoided unless it passed on what it got itself |
| | `sent_bad_block` | *nothing from this node*; it is avoided for long |
| | `polled`: the node is dead, or silent for too long | the same: Abandon it, and report `failed` |
| | `polled`: it is slow, or hardly anything else is under way | HEDGING: Hedge |
| | `polled` otherwise | the same: Continue |
| HEDGING | `polled`: the node hedged to is dead or silent | the same: Abandon it, and report `hedge_failed` |
| | `polled` otherwise | the same: Continue |
| | `hedge_answered` | RECEIVING: SwitchTo the other node |
| | `hedge_failed`, and a further node may have the blocks | HEDGING: Hedge |
| | `hedge_failed` otherwise | the state before: Continue |
| WAITING | `waited` | ASKING: Ask the same node |
| RECEIVING | `completed`: all blocks arrived | ENDED: Done |
| ASKING, RECEIVING, HEDGING | `polled` or `hedge_failed`, if cancelled or after the deadline | ENDED: GiveUp |
| any | an event that leads to ASKING, if cancelled or after the deadline | ENDED: GiveUp |

*Nothing from this node* asks the node that sent us on to it, with the request to send the blocks itself; if there is
none, the *next node*. That is the next step of policy.source_steps: ASKING: Ask, or RECEIVING_ORIGIN: ReadOrigin, with
which the machine's part is over.

Ask, SwitchTo and ReadOrigin all begin with the first block that has not arrived: the driver voids a block that is open
before it performs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from fusecache.peers.exchange import policy
from fusecache.peers.exchange.breaker import CircuitBreaker
from fusecache.peers.exchange.hedger import Hedger
from fusecache.peers.exchange.misses import MissTable
from fusecache.peers.member import Member
from fusecache.types import ObjectId


@dataclass(frozen=True)
class Ask:
    """Send a request for all blocks that have not arrived to this node."""

    member: Member
    stored_only: bool = False
    """The node is to give what it has stored, and not to wait for anything."""
    no_redirect: bool = False
    """The node is not to send us on to another one."""
    hops: int = 0
    """How often we were sent on before we came to this node."""
    failed_nodes: tuple[str, ...] = ()
    """The nodes that the asked one stands in for."""
    is_reconnect: bool = False
    """The same node once more, since a connection to it did not come about: that is no failure yet."""


@dataclass(frozen=True)
class Wait:
    """Do nothing for so many seconds, or until the flight is cancelled; then report `waited`."""

    seconds: float


@dataclass(frozen=True)
class Hedge:
    """Send this request too, and keep the first one until it is answered."""

    ask: Ask


@dataclass(frozen=True)
class SwitchTo:
    """Drop the first request, and take the blocks from the node that answered the hedge."""

    member: Member
    is_substitute: bool
    """The node fetches the blocks in the place of one that is too slow; otherwise it has them stored."""


@dataclass(frozen=True)
class ReadOrigin:
    """Read the rest from the origin: as the stripe's owner, or in the place of nodes that do not answer."""

    is_owner: bool


@dataclass(frozen=True)
class Continue:
    """Go on as before."""


@dataclass(frozen=True)
class Abandon:
    """Stop waiting for the node whose request was polled, and report that it failed."""

    reason: str


@dataclass(frozen=True)
class GiveUp:
    """The flight is over, and not all blocks have arrived."""

    is_cancelled: bool
    """The flight was cancelled; otherwise its deadline is over."""


@dataclass(frozen=True)
class Done:
    """The flight is over, and all blocks have arrived."""


Action = Ask | Wait | Hedge | SwitchTo | ReadOrigin | Continue | Abandon | GiveUp | Done


_NOBODY = Member("", "", 0)


class State(Enum):
    """Where a request is; the module's docstring has the transitions."""

    NEW = auto()
    ASKING = auto()
    RECEIVING = auto()
    WAITING = auto()
    HEDGING = auto()
    RECEIVING_ORIGIN = auto()
    ENDED = auto()


@dataclass(frozen=True)
class PeerKnowledge:
    """The knowledge of one node about the others, which all its requests share. Thread-safe."""

    own_name: str
    breaker: CircuitBreaker
    hedger: Hedger
    misses: MissTable
    clock: Callable[[], float]


class StripeRequest:
    """The state of one flight on its way through the cluster. Used by one thread; no method blocks.

    An event that the table does not have raises RuntimeError: the driver is wrong.
    """

    def __init__(
        self,
        knowledge: PeerKnowledge,
        object_id: ObjectId,
        ranking: Sequence[Member],
        member_count: int,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """`ranking` is that of the stripe in a cluster of so many members; `deadline` is a time of the knowledge's
        clock."""
        self.state = State.NEW
        self._knowledge = knowledge
        self._object_id = object_id
        self._deadline = deadline
        self._cancelled = cancelled
        self._failed_nodes: list[str] = []
        self._steps = policy.source_steps(
            ranking,
            knowledge.own_name,
            self._failed_nodes,
            knowledge.breaker.may_admit,
            lambda member: knowledge.misses.may_have(member.name, object_id),
            member_count,
        )
        self._step = policy.SourceStep(None)
        self._redirect = policy.RedirectState(_NOBODY, _NOBODY)
        self._silent_nodes: set[str] = set()
        """Nodes of this step to which one connection did not come about in time."""
        self._sender = _NOBODY
        """The node that the blocks come from, or are to come from."""
        self._is_hedged = False
        """The sender is not the node that was asked first."""
        self._may_hedge = False
        self._asked_at = 0.0
        self._next_hedge_at = 0.0
        self._pending_hedges: deque[Ask] = deque()
        self._state_before_hedge = State.ASKING

    @property
    def counts_against_sender(self) -> bool:
        """Whether a failure now says something about the node that sends: one that we were sent on to passes on what it
        got itself, and may have lost that."""
        return self._is_hedged or not self._redirect.is_redirected

    # -- events

    def start(self) -> Action:
        """The flight begins."""
        _expect(self.state, State.NEW)
        return self._next_node()

    def answered(self) -> Action:
        """The node that was asked begins to send."""
        _expect(self.state, State.ASKING)
        self.state = State.RECEIVING
        return Continue()

    def completed(self) -> Action:
        """All blocks have arrived."""
        _expect(self.state, State.RECEIVING)
        self._knowledge.breaker.request_succeeded(self._sender.name)
        self.state = State.ENDED
        return Done()

    def busy(self, retry_after: float) -> Action:
        """The node has too much to do, and says after how many seconds it wants to be asked again."""
        _expect(self.state, State.ASKING)
        self._knowledge.breaker.request_undecided(self._sender.name)
        self.state = State.WAITING
        return Wait(max(policy.MIN_RETRY_WAIT, retry_after))

    def waited(self) -> Action:
        """The time that a busy node asked for is over."""
        _expect(self.state, State.WAITING)
        return self._ask()

    def redirected(self, target: Member | None) -> Action:
        """The node sends us on to another; None: to one that is no member."""
        _expect(self.state, State.ASKING)
        redirect = self._redirect
        self._knowledge.breaker.request_succeeded(redirect.target.name)
        if redirect.no_redirect or redirect.hops >= policy.MAX_REDIRECTS:
            return self._nothing_from_node()
        redirect.follow_redirect(target, self._knowledge.own_name)
        return self._ask()

    def missed(self) -> Action:
        """The node has not got the blocks, and is not the one to fetch them."""
        _expect(self.state, State.ASKING)
        name = self._sender.name
        self._knowledge.breaker.request_undecided(name)
        if self._step.stored_only:
            self._knowledge.misses.record_miss(name, self._object_id)
        return self._nothing_from_node()

    def connect_timed_out(self, reason: str, *, is_alive: bool) -> Action:
        """No connection came about in time; `is_alive` says what the membership thinks of the node. Where many nodes
        send at once a connection's first packets get lost, and that is no reason to ask the origin; a node that is gone
        is known to be gone when it is asked for the second time."""
        _expect(self.state, State.ASKING)
        name = self._sender.name
        if name in self._silent_nodes or not is_alive:
            return self.failed(reason)
        self._silent_nodes.add(name)
        self._knowledge.breaker.request_undecided(name)
        return self._ask(is_reconnect=True)

    def failed(self, reason: str) -> Action:
        """The node did not answer, broke off, or was abandoned."""
        _expect(self.state, State.ASKING, State.RECEIVING)
        name = self._sender.name
        if self.counts_against_sender:
            self._knowledge.breaker.request_failed(name, reason)
        else:
            self._knowledge.breaker.request_undecided(name)
        return self._nothing_from_node()

    def sent_bad_block(self) -> Action:
        """A block did not have the checksum that its sender announced."""
        _expect(self.state, State.RECEIVING)
        self._knowledge.breaker.bad_block_received(self._sender.name)
        return self._nothing_from_node()

    def polled(self, silent_seconds: float, *, is_alive: bool) -> Action:
        """Some time passed. The arguments are about the node that was asked last, be it with a hedge:
        `silent_seconds` since its last byte, or its last word that it waits itself, and `is_alive`, what the membership
        thinks of it."""
        _expect(self.state, State.ASKING, State.RECEIVING, State.HEDGING)
        if over := self._give_up_if_over():
            return over
        if not is_alive:
            return Abandon("the node is not alive")
        if silent_seconds > policy.MAX_SILENCE:
            return Abandon(f"nothing came for {policy.MAX_SILENCE:g} s")
        if self.state is State.HEDGING:
            return Continue()
        now, hedger = self._knowledge.clock(), self._knowledge.hedger
        if not self._may_hedge or now < self._next_hedge_at:
            return Continue()
        sender = self._sender
        is_slow = hedger.is_slow(sender.name)
        if not is_slow and not hedger.is_mostly_idle():
            return Continue()
        self._next_hedge_at = now + policy.HEDGE_EVERY
        failed = tuple(self._failed_nodes)
        self._pending_hedges = deque(
            Ask(member, stored_only=True, no_redirect=True, failed_nodes=failed)
            for member in hedger.stored_candidates((sender.name, *failed))
        )
        if is_slow and hedger.is_substitute_due(sender.name, now - self._asked_at):
            self._may_hedge = False
            self._pending_hedges += [
                Ask(member, no_redirect=True, failed_nodes=(*failed, sender.name))
                for member in self._step.substitutes
                if member.name != sender.name
            ]
        self._state_before_hedge = self.state
        return self._next_hedge()

    def hedge_answered(self) -> Action:
        """The node that was asked last begins to send."""
        _expect(self.state, State.HEDGING)
        hedge = self._pending_hedges.popleft()
        if not hedge.stored_only:
            self._knowledge.breaker.avoid_slow_node(self._sender.name)
        self._pending_hedges.clear()
        self._sender, self._is_hedged, self._may_hedge = hedge.member, True, False
        self.state = State.RECEIVING
        return SwitchTo(hedge.member, not hedge.stored_only)

    def hedge_failed(self) -> Action:
        """The node that was asked last has nothing, or did not answer. That says nothing about it: it was asked for
        blocks that are not its own to fetch."""
        _expect(self.state, State.HEDGING)
        self._knowledge.breaker.request_undecided(self._pending_hedges.popleft().member.name)
        return self._give_up_if_over() or self._next_hedge()

    # -- transitions

    def _give_up_if_over(self) -> GiveUp | None:
        is_cancelled = self._cancelled()
        if not is_cancelled and self._knowledge.clock() < self._deadline:
            return None
        self.state = State.ENDED
        return GiveUp(is_cancelled)

    def _ask(self, *, is_reconnect: bool = False) -> Action:
        if over := self._give_up_if_over():
            return over
        redirect = self._redirect
        self.state = State.ASKING
        self._sender, self._is_hedged = redirect.target, False
        self._asked_at = self._knowledge.clock()
        self._next_hedge_at = self._asked_at + policy.HEDGE_EVERY
        self._may_hedge = not self._step.stored_only
        return Ask(
            redirect.target,
            self._step.stored_only,
            redirect.no_redirect,
            redirect.hops,
            tuple(self._failed_nodes),
            is_reconnect,
        )

    def _nothing_from_node(self) -> Action:
        redirect = self._redirect
        if redirect.is_redirected:
            redirect.return_to_member()
            return self._ask()
        if not self._step.stored_only and redirect.member.name not in self._failed_nodes:
            self._failed_nodes.append(redirect.member.name)
        return self._next_node()

    def _next_node(self) -> Action:
        for step in self._steps:
            if step.member is None:
                self.state, self._sender = State.RECEIVING_ORIGIN, _NOBODY
                return ReadOrigin(step.is_owner)
            if not step.stored_only and not self._knowledge.breaker.begin_trial(step.member.name):
                self._failed_nodes.append(step.member.name)  # it became another request's trial meanwhile
                continue
            self._step, self._redirect = step, policy.RedirectState(step.member, step.member)
            self._silent_nodes.clear()
            return self._ask()
        raise AssertionError("the last step is the origin")

    def _next_hedge(self) -> Action:
        while self._pending_hedges:
            if self._knowledge.breaker.begin_trial(self._pending_hedges[0].member.name):
                self.state = State.HEDGING
                return Hedge(self._pending_hedges[0])
            self._pending_hedges.popleft()
        self.state = self._state_before_hedge
        return Continue()


def _expect(state: State, *possible: State) -> None:
    if state not in possible:
        raise RuntimeError(f"no such event in the state {state.name}")
