"""Which nodes are alive, as this node sees it: the rules, and the table that every thread reads. No I/O.

A candidate that answers its probe is a member. It is dead when it neither answers a probe nor sends anything for
`dead_after` seconds, and at once when a request found it dead and the next probe does too. The dead are probed on, and
come back. The nodes need not agree: where two of them differ for a moment, a stripe has two owners for a moment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fusecache.bounded import BoundedDict
from fusecache.events import Event
from fusecache.peers.member import PROTOCOL, Member, NodeInfo

_log = logging.getLogger(__name__)

_LATENCY_SMOOTHING = 0.2

CandidateState = Literal["unknown", "alive", "dead", "refused", "me"]


@dataclass(frozen=True)
class MemberState:
    """One node as `fusecache peers` shows it. `state` is alive, dead, refused or unknown, `why` says more. `latency`
    and `seen` (since the last sign of life) are in seconds."""

    name: str
    url: str
    weight: int
    state: str
    why: str
    latency: float | None
    seen: float | None
    me: bool


@dataclass
class Candidate:
    """A URL at which a node may be found, and what is known of that node. Only the trio thread writes.

    | State | What happens | Next state |
    |---|---|---|
    | any | a probe is answered, and the node may be a member | alive |
    | any | a probe is answered by this node itself, or by a member at its second URL | me |
    | any | a probe is answered, and the node may not be a member; or the node lets nobody in | refused |
    | unknown | a probe fails | dead |
    | alive | a probe fails, the last sign of life is older than `dead_after`, or the node is suspected | dead |
    | dead, refused, me | a probe fails | as before |
    """

    url: str
    state: CandidateState = "unknown"
    reason: str = ""
    """Why it is dead or refused, or what its last probe failed of."""
    node_info: NodeInfo | None = None
    """Its last answer."""
    latency: float | None = None
    """Seconds that it takes to answer a probe, the mean of the last ones."""
    last_sign_of_life: float | None = None
    """By the table's clock."""
    is_suspected: bool = False
    """A request failed; the next probe decides."""

    @property
    def name(self) -> str:
        """The node's name; "" until it has answered."""
        return self.node_info.name if self.node_info is not None else ""

    @property
    def published_state(self) -> tuple[str, str, int]:
        """The part from which the members are made. Publishing them takes 10 ms in a cluster of 10,000, and there are
        100 probes a second: so it is done only when this has changed."""
        return self.state, self.name, self.node_info.weight if self.node_info is not None else 0


class MembershipTable:
    """The nodes around this one. Until `join` nobody is a member, not even this node.

    There is no lock. The trio thread alone changes candidates and members; other threads read the members, which are
    replaced as a whole, and single fields of candidates. `_heard_at` is written by any thread, a key at a time.
    `clock` is like time.monotonic; `members_changed` is published in the trio thread, after `members` has changed.
    """

    def __init__(
        self,
        own_info: NodeInfo,
        members_changed: Event[[]],
        *,
        dead_after: float = 6.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suspected: Event[[str]] = Event()
        """A request to the node of this name failed. Published in the thread of the request."""
        self._own_info = own_info
        self._members_changed = members_changed
        self._dead_after = dead_after
        self._clock = clock
        self._own_url: str | None = None
        self._candidates: dict[str, Candidate] = {}
        self._heard_at: dict[str, float] = {}
        self._logged_warnings: BoundedDict[str, None] = BoundedDict(10_000)
        self._members: tuple[Member, ...] = ()
        self._alive_names: frozenset[str] = frozenset()

    # -- from any thread

    def members(self) -> tuple[Member, ...]:
        """The nodes that are alive, by name, this one among them if it serves. The same tuple until they change."""
        return self._members

    def is_alive(self, name: str) -> bool:
        """Whether the node of this name is one of them."""
        return name in self._alive_names

    def mark_heard(self, name: str) -> None:
        """The node sent something just now."""
        self._heard_at[name] = self._clock()

    def mark_suspect(self, name: str) -> None:
        """The node did not answer a request: the prober looks at it at once."""
        self.suspected.publish(name)

    def member_states(self) -> list[MemberState]:
        """Every node there may be, for display, by name."""
        now = self._clock()
        own, rows = self._own_info, []
        if self._own_url is not None:
            rows.append(MemberState(own.name, self._own_url, own.weight, "alive", "", None, None, me=True))
        for candidate in list(self._candidates.values()):
            if candidate.state == "me":
                continue
            last = candidate.last_sign_of_life
            rows.append(
                MemberState(
                    candidate.name or candidate.url,
                    candidate.url,
                    candidate.node_info.weight if candidate.node_info is not None else 0,
                    candidate.state,
                    candidate.reason,
                    candidate.latency,
                    None if last is None else max(0.0, now - last),
                    me=False,
                )
            )
        return sorted(rows, key=lambda row: (row.name, row.url))

    # -- in the trio thread

    def join(self, own_url: str | None) -> None:
        """This node takes part from now on. `own_url` is where others reach it; None: it does not serve, and is no
        member itself."""
        self._own_url = own_url
        self._publish_members()

    def set_candidates(self, urls: frozenset[str]) -> tuple[list[str], list[Candidate]]:
        """There may be nodes at these URLs, and at no others. Returns the URLs that are gone, and the new
        candidates."""
        gone = sorted(self._candidates.keys() - urls)
        for url in gone:
            del self._candidates[url]
        added = [Candidate(url) for url in sorted(urls - self._candidates.keys())]
        self._candidates.update((candidate.url, candidate) for candidate in added)
        self._publish_members()
        return gone, added

    def suspects_named(self, name: str) -> list[Candidate]:
        """The members of this name, which are suspected from now on: one failed probe makes them dead."""
        found = [
            candidate
            for candidate in self._candidates.values()
            if candidate.name == name and candidate.state == "alive"
        ]
        for candidate in found:
            candidate.is_suspected = True
        return found

    def is_alive_by_its_bytes(self, candidate: Candidate, within: float) -> bool:
        """Whether the node has sent something in the last `within` seconds, so that a probe would tell nothing new: a
        node that is busy with others has no time to lose on probes. Takes note of that sign of life."""
        heard = self._heard_at.get(candidate.name)
        if heard is None or candidate.state != "alive" or candidate.is_suspected:
            return False
        if self._clock() - heard > within:
            return False
        candidate.last_sign_of_life = heard
        return True

    def probe_answered(self, candidate: Candidate, node_info: NodeInfo, latency: float) -> None:
        """The node said who it is, `latency` seconds after the probe began."""
        before = candidate.published_state
        known = candidate.latency
        candidate.latency = (
            latency if known is None else (1 - _LATENCY_SMOOTHING) * known + _LATENCY_SMOOTHING * latency
        )
        candidate.is_suspected = False
        candidate.last_sign_of_life = self._clock()
        candidate.node_info = node_info
        candidate.state, candidate.reason = "alive", ""
        self._settle_candidate(candidate, before)

    def probe_refused(self, candidate: Candidate, reason: str) -> None:
        """The node does not let this one in."""
        before = candidate.published_state
        candidate.is_suspected = False
        candidate.state, candidate.reason = "refused", reason
        self._warn_once(f"{candidate.url} is left out: {reason}")
        self._settle_candidate(candidate, before)

    def probe_failed(self, candidate: Candidate, reason: str) -> None:
        """No answer, or none of a node."""
        before = candidate.published_state
        signs = (candidate.last_sign_of_life, self._heard_at.get(candidate.name))
        candidate.last_sign_of_life = max((at for at in signs if at is not None), default=None)
        is_lost = (
            candidate.last_sign_of_life is None
            or candidate.is_suspected
            or self._clock() - candidate.last_sign_of_life >= self._dead_after
        )
        if candidate.state in ("alive", "unknown") and is_lost:
            candidate.state = "dead"
        candidate.reason = reason
        candidate.is_suspected = False
        self._settle_candidate(candidate, before)

    def _settle_candidate(self, candidate: Candidate, before: tuple[str, str, int]) -> None:
        self._apply_admission_rules(candidate)
        if candidate.published_state != before:
            self._publish_members()

    def _apply_admission_rules(self, candidate: Candidate) -> None:
        """Whether a candidate that answers may be a member."""
        found = candidate.node_info
        if candidate.state != "alive" or found is None:
            return
        if found.instance == self._own_info.instance:
            candidate.state = "me"
            return
        why = ""
        if found.protocol != PROTOCOL:
            why = f"it speaks protocol {found.protocol}, we {PROTOCOL}: run the same version of fusecache"
        elif found.tenant != self._own_info.tenant:
            why = "it is another tenant's"
        elif found.name == self._own_info.name:
            why = f"the name {found.name} is ours: set peers.node to another name on one of us"
        else:
            for other in self._candidates.values():
                if other is candidate or other.state != "alive" or other.node_info is None:
                    continue
                if other.node_info.instance == found.instance:
                    if other.url < candidate.url:
                        candidate.state = "me"  # the same node by another of its addresses
                    continue
                if other.name == found.name:
                    why = f"the name {found.name} is taken by {other.url}: set peers.node on one of them"
        if why:
            candidate.state, candidate.reason = "refused", why
            self._warn_once(f"node {found.name} at {candidate.url} is left out: {why}")

    def _warn_once(self, text: str) -> None:
        if text not in self._logged_warnings:
            self._logged_warnings[text] = None
            _log.warning("%s", text)

    def _publish_members(self) -> None:
        own, found = self._own_info, {}
        if self._own_url is not None:
            found[own.name] = Member(own.name, self._own_url, own.weight)
        for url in sorted(self._candidates):
            candidate = self._candidates[url]
            if candidate.state == "alive" and candidate.node_info is not None:
                found.setdefault(candidate.name, Member(candidate.name, url, candidate.node_info.weight))
        members = tuple(sorted(found.values()))
        if members == self._members:
            return
        before = {member.name for member in self._members}
        for name in sorted(found.keys() - before - {own.name}):
            _log.info("node %s joins (%s)", name, found[name].url)
        for name in sorted(before - found.keys()):
            _log.info("node %s is gone", name)
        self._members = members
        self._alive_names = frozenset(found)
        self._members_changed.publish()
