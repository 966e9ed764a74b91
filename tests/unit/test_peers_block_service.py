"""Three nodes in one process, over real sockets, that wait for an origin: nobody takes one that waits for a slow one,
or goes to the origin itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from fusecache.peers.errors import PeerError, PeerMissError
from fusecache.peers.exchange import policy, transfer_monitor
from fusecache.peers.exchange.hedger import Hedger
from fusecache.peers.exchange.misses import MissTable
from fusecache.peers.exchange.state import make_exchange_state
from fusecache.peers.exchange.stripe_request import Abandon, PeerKnowledge, StripeRequest
from fusecache.peers.exchange.transfer import PeerTransfer
from fusecache.peers.exchange.transfer_monitor import TransferMonitor
from fusecache.peers.member import Member
from fusecache.peers.outgoing import OutgoingBytes
from fusecache.peers.transport.observer import RequestTimeout
from fusecache.peers.transport.wire import BlockRequest
from tests.support.inside import BLOCK, DATA, DEADLINE, FILE, STRIPE, STRIPES, Everybody, Node, running
from tests.support.scripted import ScriptedOrigin, Step
from tests.support.servers import wait_until

SILENCE = 1.0
"""Of the nodes of these tests."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that takes seconds takes tenths, and an owner gives each stripe itself to one node only."""
    monkeypatch.setattr(policy, "MAX_SILENCE", SILENCE)
    monkeypatch.setattr(policy, "NOTICE_EVERY", SILENCE / 10)
    monkeypatch.setattr(policy, "MAX_UNCERTAIN", SILENCE / 2)
    monkeypatch.setattr(policy, "NOTICE_WITHIN", SILENCE / 2)
    monkeypatch.setattr(policy, "FAN_OUT", 1)


@pytest.fixture
def origin() -> ScriptedOrigin:
    return ScriptedOrigin([FILE], chunk=BLOCK)


@pytest.fixture
def step(origin: ScriptedOrigin) -> Iterator[Step]:
    """The origin gives nothing until it is opened."""
    held = Step()
    origin.gate = held.hold_from(0)
    yield held
    held.open()


@pytest.fixture
async def nodes(
    quick: None, tmp_path: Path, origin: ScriptedOrigin, step: Step, nursery: trio.Nursery
) -> Any:
    async with running(("n1", "n2", "n3"), tmp_path, origin, nursery) as made:
        try:
            yield made
        finally:
            step.open()


def ask(asking: Node, asked: Node, request: BlockRequest) -> None:
    """In a thread: wait for the first block of an answer."""
    asking.client.request_blocks(asked.url, request, FILE.size, RequestTimeout(2 * SILENCE)).close()


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    with trio.fail_after(DEADLINE):
        return await trio.to_thread.run_sync(functools.partial(work, *arguments))


async def test_who_waits_for_the_origin_is_waited_for(
    nodes: list[Node], origin: ScriptedOrigin, step: Step
) -> None:
    found: list[bytes] = []

    async def read(node: Node) -> None:
        found.append(await in_thread(node.read))

    async with trio.open_nursery() as readers:
        for node in nodes:
            readers.start_soon(read, node)
        await in_thread(step.arrived)
        await trio.sleep(3 * SILENCE)
        assert any(node.state.outgoing.unsent_bytes for node in nodes)
        step.open()
    assert found == [DATA] * 3
    # who gives notices the end a moment after who takes
    await in_thread(
        wait_until,
        lambda: not any(node.state.outgoing.unsent_bytes for node in nodes),
        "all is sent",
        DEADLINE,
    )
    assert sum(length for _, _, length in origin.reads) == FILE.size
    told = [node.block_source.stats for node in nodes]
    assert sum(stats.redirects for stats in told) >= STRIPES, "nobody waited for one that waits itself"
    assert [stats.fallbacks for stats in told] == [0, 0, 0]
    assert not any(peer.errors for stats in told for peer in stats.traffic_by_node.values())
    slow = [other.name for node in nodes for other in nodes if node.state.speeds.is_slow(other.name)]
    assert not slow


async def test_who_passes_on_what_nobody_says_is_coming_loses_patience(
    nodes: list[Node], step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = nodes[0].state.rankings.ranking_of(FILE.id, 0)[0].name
    asked, asking = [node for node in nodes if node.name != owner]
    request = BlockRequest(FILE.id, range(4), FILE, BLOCK, DEADLINE, hops=1, caller=asking.name)

    object_fetch = asked.fetch_service.open_object(FILE, "")
    waiter = asked.fetch_service.request_bytes(object_fetch, 0, BLOCK, lambda _waiter: None)
    assert waiter is not None
    try:
        await in_thread(step.arrived)
        with pytest.raises(PeerError, match="no answer within"):
            await in_thread(ask, asking, asked, request)
        monkeypatch.setattr(asked.state.dependencies, "arrival_certain_at", lambda _stripe: 0.0)
        with pytest.raises(PeerMissError):
            await in_thread(ask, asking, asked, request)
    finally:
        asked.fetch_service.cancel_waiter(waiter)
        asked.fetch_service.release_fetch(object_fetch)


async def test_a_stand_in_that_waits_for_others_itself_is_not_waited_for_for_long(
    nodes: list[Node], step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, next_in_order, last = _in_order(nodes)
    request = BlockRequest(
        FILE.id, range(4), FILE, BLOCK, DEADLINE, failed_nodes=(owner.name,), caller=last.name
    )

    object_fetch = next_in_order.fetch_service.open_object(FILE, "")
    waiter = next_in_order.fetch_service.request_bytes(object_fetch, 0, BLOCK, lambda _waiter: None)
    assert waiter is not None
    try:
        await in_thread(step.arrived)
        monkeypatch.setattr(next_in_order.state.dependencies, "arrival_certain_at", lambda _stripe: 0.0)
        with pytest.raises(PeerMissError):
            await in_thread(ask, last, next_in_order, request)
    finally:
        next_in_order.fetch_service.cancel_waiter(waiter)
        next_in_order.fetch_service.release_fetch(object_fetch)


async def test_a_stand_in_does_not_wait_for_who_asks_it(
    nodes: list[Node], step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that gets a stripe from the owner finds it slow, and asks the next, which gets it from this node."""
    monkeypatch.setattr(policy, "HEDGE_EVERY", SILENCE / 2)
    monkeypatch.setattr(policy, "SUBSTITUTE_AFTER", SILENCE)
    owner, next_in_order, last = _in_order(nodes)
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()
    request_blocks = last.client.request_blocks

    def noted(url: str, request: BlockRequest, *arguments: Any) -> Any:
        if url == next_in_order.url and owner.name in request.failed_nodes:
            token.run_sync_soon(asked.set)
        return request_blocks(url, request, *arguments)

    monkeypatch.setattr(last.client, "request_blocks", noted)
    found: list[bytes] = []

    async def read(node: Node) -> None:
        found.append(await in_thread(node.read))

    async with trio.open_nursery() as readers:
        readers.start_soon(read, last)
        await in_thread(step.arrived)
        readers.start_soon(read, next_in_order)
        redirected = next_in_order.block_source.stats
        await in_thread(wait_until, lambda: redirected.redirects, "who comes later is sent on", DEADLINE)
        monkeypatch.setattr(last.state.speeds, "is_slow", lambda name: name == owner.name)
        with trio.fail_after(DEADLINE):
            await asked.wait()
        await trio.sleep(SILENCE / 2)
        step.open()
    assert found == [DATA] * 2


@pytest.mark.parametrize("place", [0, 1], ids=["owner", "next"])
async def test_nobody_gets_a_stripe_from_who_gets_it_from_him(
    nodes: list[Node], step: Step, place: int
) -> None:
    """Its owner dies, who was sent on to us asks the next in order: and that one was sent on to who asks."""
    ordered = _in_order(nodes)
    asked, asking = ordered[place], ordered[2]
    failed = tuple(node.name for node in ordered[:place])
    request = BlockRequest(FILE.id, range(4), FILE, BLOCK, DEADLINE, failed_nodes=failed, caller=asking.name)

    with (
        asked.state.dependencies.awaiting((FILE.id, 0), asking.name),
        pytest.raises(PeerMissError, match="for node"),
    ):
        await in_thread(ask, asking, asked, request)
    with pytest.raises(PeerError, match="no answer within"):
        await in_thread(ask, asking, asked, request)


def _in_order(nodes: list[Node]) -> list[Node]:
    """As the first stripe ranks them."""
    order = [member.name for member in nodes[0].state.rankings.ranking_of(FILE.id, 0)]
    return sorted(nodes, key=lambda node: order.index(node.name))


class Monitored:
    """A request to a node `a` for the first stripe, its monitor, and what that reports."""

    def __init__(self) -> None:
        everybody = Everybody()
        everybody.found = (Member("a", "http://a:1", 1), Member("me", "http://me:1", 1))
        self.state = make_exchange_state("me", everybody, OutgoingBytes(), stripe_bytes=STRIPE)
        self.reports: list[tuple[int, float]] = []
        hedger = Hedger("me", everybody.members, self.state.speeds, self.state.receiver_rates, lambda: False)
        knowledge = PeerKnowledge("me", self.state.breaker, hedger, MissTable(), lambda: 0.0)
        self.request = StripeRequest(
            knowledge, FILE.id, everybody.found, 2, deadline=math.inf, cancelled=lambda: False
        )
        self.request.start()
        transfer = PeerTransfer(
            FILE, range(4), BLOCK, math.inf, lambda: False, CarelessSink(), True, next_block=0
        )
        self.monitor = TransferMonitor(
            everybody.found[0],
            transfer,
            (FILE.id, 0),
            dependencies=self.state.dependencies,
            recorder=self,
            poll_request=self.poll_request,
        )

    def record_arrival(self, member: Member, nbytes: int, seconds: float, *, stored: bool) -> None:
        self.reports.append((nbytes, seconds))

    def poll_request(self, silent_seconds: float) -> str | None:
        action = self.request.polled(silent_seconds, is_alive=True)
        return action.reason if isinstance(action, Abandon) else None


class CarelessSink:
    """Takes everything, and keeps nothing."""

    def begin_block(self, checksum: int | None) -> None:
        pass

    def write(self, view: memoryview) -> None:
        pass

    def end_block(self) -> bool:
        return True

    def restart_block(self) -> None:
        pass


def test_a_node_that_says_nothing_is_passed_over(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(transfer_monitor, "time", SimpleNamespace(monotonic=lambda: now))
    watched = Monitored()

    def wait(age: float | None) -> str | None:
        """As long as a node may be silent, and half as long again."""
        nonlocal now
        found = None
        for _ in range(3):
            if age is not None:
                watched.monitor.node_waiting(age)
            now += SILENCE / 2
            found = watched.monitor.poll()
        return found

    assert wait(0.0) is None
    assert watched.state.dependencies.arrival_certain_at((FILE.id, 0)) == now - SILENCE / 2
    watched.monitor.bytes_arrived()
    assert wait(2 * SILENCE) == "nothing came for 1 s"
    watched.monitor.bytes_arrived()
    assert wait(None) == "nothing came for 1 s"


@pytest.mark.parametrize(("stored", "seconds"), [(False, 2.0), (True, 12.0)])
def test_what_a_node_waits_for_itself_is_not_its_slowness(
    stored: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that passes a stripe on can't send what has not come; one that has it has no excuse."""
    now = 100.0
    monkeypatch.setattr(transfer_monitor, "time", SimpleNamespace(monotonic=lambda: now))
    watched = Monitored()
    monitor = watched.monitor
    monitor.answered(all_stored=stored)
    now += 1.0
    for wait in (0.0, 10.0):
        now += wait / 2
        monitor.poll()
        now += wait / 2
        monitor.bytes_arrived()
        monitor.begin_block(1)
        now += 0.5
        monitor.write(memoryview(bytes(BLOCK)))
        assert monitor.end_block()
    monitor.report_progress()
    assert sum(nbytes for nbytes, _ in watched.reports) == 2 * BLOCK
    assert sum(took for _, took in watched.reports) == pytest.approx(seconds)
