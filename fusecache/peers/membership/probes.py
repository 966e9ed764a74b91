"""Keeps a MembershipTable up to date: asks every candidate again and again who it is. Runs in the trio thread."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from fusecache.peers.errors import PeerError, PeerRefusedError
from fusecache.peers.member import NodeInfo
from fusecache.peers.membership.discovery import Discovery
from fusecache.peers.membership.table import Candidate, MembershipTable

_log = logging.getLogger(__name__)

_PROBES_PER_SECOND = 100.0
"""Of one node: in larger clusters each candidate is probed less often."""
_SUSPECT_TIMEOUT = 1.0
"""Seconds in which a suspected node has to answer."""
_FIRST_ROUND_TIMEOUT = 3.0
"""Seconds that the first round of probes may take before this node goes on without the rest."""
_MAX_CONCURRENT_PROBES = 64


@dataclass
class _ProbeTask:
    """The task that probes one candidate."""

    candidate: Candidate
    cancel_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    probe_now: trio.Event = field(default_factory=trio.Event)
    """Set to cut the pause before the next probe short."""
    was_probed: bool = False


class MembershipProber:
    """Probes the candidates that `discovery` finds, and tells `table` what came of it. `probe_url` asks a URL who is
    there and raises PeerError; a candidate is probed about every `interval` seconds."""

    def __init__(
        self,
        table: MembershipTable,
        discovery: Discovery,
        probe_url: Callable[[str], Awaitable[NodeInfo]],
        *,
        interval: float = 2.0,
    ) -> None:
        self._table = table
        self._discovery = discovery
        self._probe_url = probe_url
        self._interval = interval
        self._tasks: dict[str, _ProbeTask] = {}
        self._probe_limiter = trio.CapacityLimiter(_MAX_CONCURRENT_PROBES)
        self._first_round_done = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled; started when each of the first candidates was probed once, or after some seconds."""
        token = trio.lowlevel.current_trio_token()

        def on_suspected(name: str) -> None:
            try:
                token.run_sync_soon(self._probe_suspects, name, idempotent=True)
            except trio.RunFinishedError:
                _log.debug("node %s is suspected after the cluster was left", name)

        self._table.suspected.subscribe(on_suspected)
        async with trio.open_nursery() as nursery:

            def set_candidates(urls: frozenset[str]) -> None:
                gone, added = self._table.set_candidates(urls)
                for url in gone:
                    self._tasks.pop(url).cancel_scope.cancel()
                for candidate in added:
                    task = self._tasks[candidate.url] = _ProbeTask(candidate)
                    nursery.start_soon(self._watch_candidate, task)
                self._check_first_round()

            nursery.start_soon(self._discovery.run, set_candidates)
            with trio.move_on_after(_FIRST_ROUND_TIMEOUT):
                await self._first_round_done.wait()
            task_status.started()

    def _check_first_round(self) -> None:
        if all(task.was_probed for task in self._tasks.values()):
            self._first_round_done.set()

    def _probe_suspects(self, name: str) -> None:
        for candidate in self._table.suspects_named(name):
            self._tasks[candidate.url].probe_now.set()

    async def _watch_candidate(self, task: _ProbeTask) -> None:
        with task.cancel_scope:
            while True:
                if not self._table.is_alive_by_its_bytes(task.candidate, self._interval):
                    try:
                        await self._probe_candidate(task.candidate)
                    finally:
                        task.was_probed = True
                    self._check_first_round()
                every = max(self._interval, len(self._tasks) / _PROBES_PER_SECOND)
                task.probe_now = trio.Event()
                with trio.move_on_after(every * random.uniform(0.8, 1.2)):  # noqa: S311  jitter
                    await task.probe_now.wait()

    async def _probe_candidate(self, candidate: Candidate) -> None:
        timeout = _SUSPECT_TIMEOUT if candidate.is_suspected else min(self._interval, 2.0)
        try:
            async with self._probe_limiter:
                began = trio.current_time()
                with trio.fail_after(timeout):
                    node_info = await self._probe_url(candidate.url)
        except PeerRefusedError as error:
            self._table.probe_refused(candidate, str(error))
        except (PeerError, trio.TooSlowError) as error:
            self._table.probe_failed(candidate, str(error) or f"no answer within {timeout:g} s")
        else:
            self._table.probe_answered(candidate, node_info, trio.current_time() - began)
