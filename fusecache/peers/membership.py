"""Which nodes are alive. All state belongs to the trio thread; other threads read what it has published.

A candidate that answers its probe is a member; a member that neither answers nor sends anything for `dead_after`
seconds is dead, and so is one that a request found dead and that does not answer at once. The dead are probed on, and
come back. Nobody has to agree with anybody: where two nodes differ for a moment, a stripe has two owners for a moment.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from fusecache.peers.discovery import Discovery
from fusecache.peers.errors import PeerError, PeerRefusedError
from fusecache.peers.member import PROTOCOL, Health, Member

_log = logging.getLogger(__name__)

_PROBES_PER_SECOND = 100.0
"""Of one node: larger clusters are looked at less often."""
_SECOND_LOOK = 1.0
"""Seconds in which a node that is suspected has to answer."""
_FIRST_ROUND = 3.0
"""Seconds that the first round of probes may take before we go on without the rest."""
_AT_ONCE = 64
_SMOOTH = 0.2


@dataclass(frozen=True)
class MemberState:
    """One node as it is shown. `state` is alive, dead, refused or unknown, `why` says more; `latency` and `seen` (since
    it last answered) are in seconds."""

    name: str
    url: str
    weight: int
    state: str
    why: str
    latency: float | None
    seen: float | None
    me: bool


@dataclass
class _Candidate:
    url: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    health: Health | None = None
    state: str = "unknown"
    why: str = ""
    latency: float | None = None
    success: float | None = None
    """trio time of its last sign of life."""
    hurry: trio.Event = field(default_factory=trio.Event)
    suspected: bool = False
    probed: bool = False

    @property
    def name(self) -> str:
        return self.health.name if self.health is not None else ""

    @property
    def shown(self) -> tuple[str, str, int]:
        """What is published of it: to publish takes 10 ms in a cluster of 10,000, and there are 100 probes a second."""
        return self.state, self.name, self.health.weight if self.health is not None else 0


class Membership:
    """The nodes around this one. `url` is None for a node that does not serve; `probe` asks a URL who is there and
    raises PeerError; times are in seconds; `on_change` is called in the trio thread when `members` has changed."""

    def __init__(
        self,
        me: Health,
        url: str | None,
        discovery: Discovery,
        probe: Callable[[str], Awaitable[Health]],
        *,
        interval: float = 2.0,
        dead_after: float = 6.0,
        on_change: Callable[[], None],
    ) -> None:
        self._me = me
        self._url = url
        self._discovery = discovery
        self._probe = probe
        self._interval = interval
        self._dead_after = dead_after
        self._on_change = on_change
        self._candidates: dict[str, _Candidate] = {}
        self._heard: dict[str, float] = {}
        """Name -> trio time; written by other threads, a key at a time."""
        self._told: set[str] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._clock: trio.abc.Clock | None = None
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._round = trio.Event()
        own = () if url is None else (Member(me.name, url, me.weight),)
        self._members: tuple[Member, ...] = own
        self._names = frozenset(member.name for member in own)
        self.epoch = 0
        """Grows whenever `members` changes."""

    # -- from any thread

    def members(self) -> tuple[Member, ...]:
        """The nodes that are alive, by name, this one among them if it serves."""
        return self._members

    def is_alive(self, name: str) -> bool:
        """Whether it is one of them."""
        return name in self._names

    def heard(self, name: str) -> None:
        """It sent something just now."""
        if self._token is not None:
            self._heard[name] = self._now()

    def suspect(self, name: str) -> None:
        """It did not answer a request: look at it now."""
        if self._token is not None:
            try:
                self._token.run_sync_soon(self._suspect, name, idempotent=True)
            except trio.RunFinishedError:
                _log.debug("the cluster was left")

    def _now(self) -> float:
        return 0.0 if self._clock is None else self._clock.current_time()

    def states(self) -> list[MemberState]:
        """Every node there may be, as it is shown; for display."""
        now = self._now()
        rows = []
        if self._url is not None:
            rows.append(
                MemberState(self._me.name, self._url, self._me.weight, "alive", "", None, None, me=True)
            )
        for candidate in list(self._candidates.values()):
            if candidate.state == "me":
                continue
            seen = None if candidate.success is None else max(0.0, now - candidate.success)
            weight = candidate.health.weight if candidate.health is not None else 0
            rows.append(
                MemberState(
                    candidate.name or candidate.url,
                    candidate.url,
                    weight,
                    candidate.state,
                    candidate.why,
                    candidate.latency,
                    seen,
                    me=False,
                )
            )
        return sorted(rows, key=lambda row: (row.name, row.url))

    # -- in the trio thread

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled; started when each first candidate was probed once, or after a few seconds."""
        self._token = trio.lowlevel.current_trio_token()
        self._clock = trio.lowlevel.current_clock()
        async with trio.open_nursery() as nursery:

            def found(urls: frozenset[str]) -> None:
                for gone in self._candidates.keys() - urls:
                    self._candidates.pop(gone).scope.cancel()
                for url in sorted(urls - self._candidates.keys()):
                    candidate = self._candidates[url] = _Candidate(url)
                    nursery.start_soon(self._watch, candidate)
                self._publish()
                self._count_round()

            nursery.start_soon(self._discovery.run, found)
            with trio.move_on_after(_FIRST_ROUND):
                await self._round.wait()
            task_status.started()

    def _count_round(self) -> None:
        if all(candidate.probed for candidate in self._candidates.values()):
            self._round.set()

    async def _watch(self, candidate: _Candidate) -> None:
        with candidate.scope:
            while True:
                if not self._heard_lately(candidate):
                    shown = candidate.shown
                    try:
                        await self._look(candidate)
                    finally:
                        candidate.probed = True
                    self._judge(candidate)
                    if candidate.shown != shown:
                        self._publish()
                    self._count_round()
                every = max(self._interval, len(self._candidates) / _PROBES_PER_SECOND)
                candidate.hurry = trio.Event()
                with trio.move_on_after(every * random.uniform(0.8, 1.2)):  # noqa: S311  jitter
                    await candidate.hurry.wait()

    def _heard_lately(self, candidate: _Candidate) -> bool:
        """Whether it is alive by what it sends, so that a probe would tell nothing. A node that is busy with others
        has no time to lose on those."""
        heard = self._heard.get(candidate.name)
        if heard is None or candidate.state != "alive" or candidate.suspected:
            return False
        if trio.current_time() - heard > self._interval:
            return False
        candidate.success = heard
        return True

    async def _look(self, candidate: _Candidate) -> None:
        timeout = _SECOND_LOOK if candidate.suspected else min(self._interval, 2.0)
        began = trio.current_time()
        try:
            async with self._slots:
                began = trio.current_time()
                with trio.fail_after(timeout):
                    health = await self._probe(candidate.url)
        except PeerRefusedError as error:
            candidate.state, candidate.why = "refused", str(error)
            self._tell(f"{candidate.url} is left out: {error}")
            return
        except (PeerError, trio.TooSlowError) as error:
            signs = [at for at in (candidate.success, self._heard.get(candidate.name)) if at is not None]
            candidate.success = max(signs, default=None)
            if candidate.success is None:
                lost = True
            else:
                silent = trio.current_time() - candidate.success
                lost = candidate.suspected or silent >= self._dead_after
            if candidate.state in ("alive", "unknown") and lost:
                candidate.state = "dead"
            candidate.why = str(error) or f"no answer within {timeout:g} s"
            candidate.suspected = False
            return
        now = trio.current_time()
        candidate.suspected = False
        took = now - began
        known = candidate.latency
        candidate.latency = took if known is None else (1 - _SMOOTH) * known + _SMOOTH * took
        candidate.success = now
        candidate.health = health
        candidate.state, candidate.why = "alive", ""

    def _judge(self, candidate: _Candidate) -> None:
        """Whether one that answers may be a member."""
        health = candidate.health
        if candidate.state != "alive" or health is None:
            return
        if health.instance == self._me.instance:
            candidate.state = "me"
            return
        why = ""
        if health.protocol != PROTOCOL:
            why = f"it speaks protocol {health.protocol}, we {PROTOCOL}: run the same version of fusecache"
        elif health.tenant != self._me.tenant:
            why = "it is another tenant's"
        elif health.name == self._me.name:
            why = f"the name {health.name} is ours: set peers.node to another name on one of us"
        else:
            for other in self._candidates.values():
                if other is candidate or other.state != "alive" or other.health is None:
                    continue
                if other.health.instance == health.instance:
                    if other.url < candidate.url:
                        candidate.state = "me"  # the same node by another of its addresses
                    continue
                if other.name == health.name:
                    why = f"the name {health.name} is taken by {other.url}: set peers.node on one of them"
        if why:
            candidate.state, candidate.why = "refused", why
            self._tell(f"node {health.name} at {candidate.url} is left out: {why}")

    def _tell(self, text: str) -> None:
        if text not in self._told and len(self._told) < 10_000:
            self._told.add(text)
            _log.warning("%s", text)

    def _suspect(self, name: str) -> None:
        for candidate in self._candidates.values():
            if candidate.name == name and candidate.state == "alive":
                candidate.suspected = True
                candidate.hurry.set()

    def _publish(self) -> None:
        found: dict[str, Member] = {}
        if self._url is not None:
            found[self._me.name] = Member(self._me.name, self._url, self._me.weight)
        for url in sorted(self._candidates):
            candidate = self._candidates[url]
            if candidate.state == "alive" and candidate.health is not None:
                member = Member(candidate.name, url, candidate.health.weight)
                found.setdefault(candidate.name, member)
        members = tuple(sorted(found.values()))
        if members == self._members:
            return
        before = {member.name for member in self._members}
        for name in sorted(found.keys() - before):
            _log.info("node %s joins (%s)", name, found[name].url)
        for name in sorted(before - found.keys()):
            _log.info("node %s is gone", name)
        self._members = members
        self._names = frozenset(found)
        self.epoch += 1
        self._on_change()
