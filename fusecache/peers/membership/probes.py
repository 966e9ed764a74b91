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

from fusecache.peers.errors import PeerError, PeerRefusedError
from fusecache.peers.member import PROTOCOL, Member, NodeInfo
from fusecache.peers.membership.discovery import Discovery

_log = logging.getLogger(__name__)

_PROBES_PER_SECOND = 100.0
"""Of one node: larger clusters are looked at less often."""
_SUSPECT_TIMEOUT = 1.0
"""Seconds in which a node that is suspected has to answer."""
_FIRST_ROUND_TIMEOUT = 3.0
"""Seconds that the first round of probes may take before we go on without the rest."""
_MAX_CONCURRENT_PROBES = 64
_LATENCY_SMOOTHING = 0.2


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
    cancel_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    node_info: NodeInfo | None = None
    state: str = "unknown"
    reason: str = ""
    latency: float | None = None
    last_sign_of_life: float | None = None
    """trio time of its last sign of life."""
    probe_now: trio.Event = field(default_factory=trio.Event)
    is_suspected: bool = False
    was_probed: bool = False

    @property
    def name(self) -> str:
        return self.node_info.name if self.node_info is not None else ""

    @property
    def published_state(self) -> tuple[str, str, int]:
        """What is published of it: to publish takes 10 ms in a cluster of 10,000, and there are 100 probes a second."""
        return self.state, self.name, self.node_info.weight if self.node_info is not None else 0


class Membership:
    """The nodes around this one. `url` is None for a node that does not serve; `probe` asks a URL who is there and
    raises PeerError; times are in seconds; `on_change` is called in the trio thread when `members` has changed."""

    def __init__(
        self,
        own_info: NodeInfo,
        own_url: str | None,
        discovery: Discovery,
        probe_url: Callable[[str], Awaitable[NodeInfo]],
        *,
        interval: float = 2.0,
        dead_after: float = 6.0,
        on_members_changed: Callable[[], None],
    ) -> None:
        self._own_info = own_info
        self._own_url = own_url
        self._discovery = discovery
        self._probe_url = probe_url
        self._interval = interval
        self._dead_after = dead_after
        self._on_members_changed = on_members_changed
        self._candidates: dict[str, _Candidate] = {}
        self._heard_at: dict[str, float] = {}
        """Name -> trio time; written by other threads, a key at a time."""
        self._logged_warnings: set[str] = set()
        self._trio_token: trio.lowlevel.TrioToken | None = None
        self._clock: trio.abc.Clock | None = None
        self._probe_limiter = trio.CapacityLimiter(_MAX_CONCURRENT_PROBES)
        self._first_round_done = trio.Event()
        own = () if own_url is None else (Member(own_info.name, own_url, own_info.weight),)
        self._members: tuple[Member, ...] = own
        self._alive_names = frozenset(member.name for member in own)
        self.epoch = 0
        """Grows whenever `members` changes."""

    # -- from any thread

    def members(self) -> tuple[Member, ...]:
        """The nodes that are alive, by name, this one among them if it serves."""
        return self._members

    def is_alive(self, name: str) -> bool:
        """Whether it is one of them."""
        return name in self._alive_names

    def mark_heard(self, name: str) -> None:
        """It sent something just now."""
        if self._trio_token is not None:
            self._heard_at[name] = self._now()

    def mark_suspect(self, name: str) -> None:
        """It did not answer a request: look at it now."""
        if self._trio_token is not None:
            try:
                self._trio_token.run_sync_soon(self._mark_suspected, name, idempotent=True)
            except trio.RunFinishedError:
                _log.debug("the cluster was left")

    def _now(self) -> float:
        return 0.0 if self._clock is None else self._clock.current_time()

    def member_states(self) -> list[MemberState]:
        """Every node there may be, as it is shown; for display."""
        now = self._now()
        rows = []
        if self._own_url is not None:
            rows.append(
                MemberState(
                    self._own_info.name,
                    self._own_url,
                    self._own_info.weight,
                    "alive",
                    "",
                    None,
                    None,
                    me=True,
                )
            )
        for candidate in list(self._candidates.values()):
            if candidate.state == "me":
                continue
            seen = (
                None if candidate.last_sign_of_life is None else max(0.0, now - candidate.last_sign_of_life)
            )
            weight = candidate.node_info.weight if candidate.node_info is not None else 0
            rows.append(
                MemberState(
                    candidate.name or candidate.url,
                    candidate.url,
                    weight,
                    candidate.state,
                    candidate.reason,
                    candidate.latency,
                    seen,
                    me=False,
                )
            )
        return sorted(rows, key=lambda row: (row.name, row.url))

    # -- in the trio thread

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled; started when each first candidate was probed once, or after a few seconds."""
        self._trio_token = trio.lowlevel.current_trio_token()
        self._clock = trio.lowlevel.current_clock()
        async with trio.open_nursery() as nursery:

            def found(urls: frozenset[str]) -> None:
                for gone in self._candidates.keys() - urls:
                    self._candidates.pop(gone).cancel_scope.cancel()
                for url in sorted(urls - self._candidates.keys()):
                    candidate = self._candidates[url] = _Candidate(url)
                    nursery.start_soon(self._watch_candidate, candidate)
                self._publish_members()
                self._update_first_round()

            nursery.start_soon(self._discovery.run, found)
            with trio.move_on_after(_FIRST_ROUND_TIMEOUT):
                await self._first_round_done.wait()
            task_status.started()

    def _update_first_round(self) -> None:
        if all(candidate.was_probed for candidate in self._candidates.values()):
            self._first_round_done.set()

    async def _watch_candidate(self, candidate: _Candidate) -> None:
        with candidate.cancel_scope:
            while True:
                if not self._apply_recent_bytes(candidate):
                    shown = candidate.published_state
                    try:
                        await self._probe_candidate(candidate)
                    finally:
                        candidate.was_probed = True
                    self._apply_admission_rules(candidate)
                    if candidate.published_state != shown:
                        self._publish_members()
                    self._update_first_round()
                every = max(self._interval, len(self._candidates) / _PROBES_PER_SECOND)
                candidate.probe_now = trio.Event()
                with trio.move_on_after(every * random.uniform(0.8, 1.2)):  # noqa: S311  jitter
                    await candidate.probe_now.wait()

    def _apply_recent_bytes(self, candidate: _Candidate) -> bool:
        """Whether it is alive by what it sends, so that a probe would tell nothing. A node that is busy with others
        has no time to lose on those."""
        heard = self._heard_at.get(candidate.name)
        if heard is None or candidate.state != "alive" or candidate.is_suspected:
            return False
        if trio.current_time() - heard > self._interval:
            return False
        candidate.last_sign_of_life = heard
        return True

    async def _probe_candidate(self, candidate: _Candidate) -> None:
        timeout = _SUSPECT_TIMEOUT if candidate.is_suspected else min(self._interval, 2.0)
        began = trio.current_time()
        try:
            async with self._probe_limiter:
                began = trio.current_time()
                with trio.fail_after(timeout):
                    health = await self._probe_url(candidate.url)
        except PeerRefusedError as error:
            candidate.state, candidate.reason = "refused", str(error)
            self._warn_once(f"{candidate.url} is left out: {error}")
            return
        except (PeerError, trio.TooSlowError) as error:
            signs = [
                at
                for at in (candidate.last_sign_of_life, self._heard_at.get(candidate.name))
                if at is not None
            ]
            candidate.last_sign_of_life = max(signs, default=None)
            if candidate.last_sign_of_life is None:
                lost = True
            else:
                silent = trio.current_time() - candidate.last_sign_of_life
                lost = candidate.is_suspected or silent >= self._dead_after
            if candidate.state in ("alive", "unknown") and lost:
                candidate.state = "dead"
            candidate.reason = str(error) or f"no answer within {timeout:g} s"
            candidate.is_suspected = False
            return
        now = trio.current_time()
        candidate.is_suspected = False
        took = now - began
        known = candidate.latency
        candidate.latency = (
            took if known is None else (1 - _LATENCY_SMOOTHING) * known + _LATENCY_SMOOTHING * took
        )
        candidate.last_sign_of_life = now
        candidate.node_info = health
        candidate.state, candidate.reason = "alive", ""

    def _apply_admission_rules(self, candidate: _Candidate) -> None:
        """Whether one that answers may be a member."""
        health = candidate.node_info
        if candidate.state != "alive" or health is None:
            return
        if health.instance == self._own_info.instance:
            candidate.state = "me"
            return
        why = ""
        if health.protocol != PROTOCOL:
            why = f"it speaks protocol {health.protocol}, we {PROTOCOL}: run the same version of fusecache"
        elif health.tenant != self._own_info.tenant:
            why = "it is another tenant's"
        elif health.name == self._own_info.name:
            why = f"the name {health.name} is ours: set peers.node to another name on one of us"
        else:
            for other in self._candidates.values():
                if other is candidate or other.state != "alive" or other.node_info is None:
                    continue
                if other.node_info.instance == health.instance:
                    if other.url < candidate.url:
                        candidate.state = "me"  # the same node by another of its addresses
                    continue
                if other.name == health.name:
                    why = f"the name {health.name} is taken by {other.url}: set peers.node on one of them"
        if why:
            candidate.state, candidate.reason = "refused", why
            self._warn_once(f"node {health.name} at {candidate.url} is left out: {why}")

    def _warn_once(self, text: str) -> None:
        if text not in self._logged_warnings and len(self._logged_warnings) < 10_000:
            self._logged_warnings.add(text)
            _log.warning("%s", text)

    def _mark_suspected(self, name: str) -> None:
        for candidate in self._candidates.values():
            if candidate.name == name and candidate.state == "alive":
                candidate.is_suspected = True
                candidate.probe_now.set()

    def _publish_members(self) -> None:
        found: dict[str, Member] = {}
        if self._own_url is not None:
            found[self._own_info.name] = Member(self._own_info.name, self._own_url, self._own_info.weight)
        for url in sorted(self._candidates):
            candidate = self._candidates[url]
            if candidate.state == "alive" and candidate.node_info is not None:
                member = Member(candidate.name, url, candidate.node_info.weight)
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
        self._alive_names = frozenset(found)
        self.epoch += 1
        self._on_members_changed()
