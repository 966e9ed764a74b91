"""Which nodes are members, by a clock that waits for nobody."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from fusecache.events import Event
from fusecache.peers.errors import PeerError
from fusecache.peers.member import PROTOCOL, NodeInfo
from fusecache.peers.membership.discovery import CandidatesListener, DnsDiscovery
from fusecache.peers.membership.probes import MembershipProber
from fusecache.peers.membership.table import MembershipTable

ME = NodeInfo("me", "instance-me", 100, "", PROTOCOL, "0", 0.0)


def health(at: str, instance: str = "", **changes: object) -> NodeInfo:
    fields = {**vars(ME), "name": at, "instance": instance or f"instance-{at}", **changes}
    return NodeInfo(**fields)  # type: ignore[arg-type]


class World:
    """Nodes that answer, or don't, and what is found."""

    def __init__(self, *urls: str) -> None:
        self.nodes: dict[str, NodeInfo] = {}
        self.hanging: set[str] = set()
        self.urls = frozenset(urls)
        self.on_candidates: CandidatesListener | None = None
        self.changes = 0
        self.probes = 0

    async def run(self, on_candidates: CandidatesListener) -> None:
        self.on_candidates = on_candidates
        on_candidates(self.urls)
        await trio.sleep_forever()

    async def probe(self, url: str) -> NodeInfo:
        self.probes += 1
        if url in self.hanging:
            await trio.sleep_forever()
        if url not in self.nodes:
            raise PeerError(f"{url}: connection refused")
        return self.nodes[url]

    def changed(self) -> None:
        self.changes += 1


def url_of(number: int) -> str:
    return f"http://10.0.0.{number}:7070"


@pytest.fixture
def clock(autojump_clock: MockClock) -> MockClock:
    return autojump_clock


async def start(
    world: World, nursery: trio.Nursery, url: str | None = "http://10.0.0.9:7070"
) -> MembershipTable:
    members_changed: Event[[]] = Event()
    table = MembershipTable(ME, members_changed, clock=trio.lowlevel.current_clock().current_time)
    assert table.members() == ()
    table.join(url)
    members_changed.subscribe(world.changed)
    await nursery.start(MembershipProber(table, world, world.probe).run)
    return table


def names(membership: MembershipTable) -> list[str]:
    return [member.name for member in membership.members()]


async def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  the clock jumps
            await trio.sleep(0.1)


async def test_who_answers_is_a_member_once_it_has_started(clock: MockClock) -> None:
    world = World(url_of(1), url_of(2), url_of(3))
    world.nodes = {url_of(1): health("a"), url_of(2): health("b", weight=7)}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        assert names(membership) == ["a", "b", "me"]
        assert [member.weight for member in membership.members()] == [100, 7, 100]
        assert membership.is_alive("a")
        assert not membership.is_alive("c")
        assert {row.name: row.state for row in membership.member_states()} == {
            "a": "alive",
            "b": "alive",
            "me": "alive",
            url_of(3): "dead",
        }
        nursery.cancel_scope.cancel()


async def test_one_that_does_not_serve_is_no_member_of_its_own_cluster(clock: MockClock) -> None:
    world = World(url_of(1))
    world.nodes = {url_of(1): health("a")}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery, url=None)
        assert names(membership) == ["a"]
        nursery.cancel_scope.cancel()


async def test_it_starts_though_a_node_hangs(clock: MockClock) -> None:
    world = World(url_of(1), url_of(2))
    world.nodes = {url_of(1): health("a")}
    world.hanging = {url_of(2)}
    async with trio.open_nursery() as nursery:
        with trio.fail_after(5):
            membership = await start(world, nursery)
        assert names(membership) == ["a", "me"]
        nursery.cancel_scope.cancel()


async def test_one_that_falls_silent_is_dead_after_a_while_and_comes_back(clock: MockClock) -> None:
    world = World(url_of(1))
    world.nodes = {url_of(1): health("a")}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        world.hanging = {url_of(1)}
        await trio.sleep(4)
        assert names(membership) == ["a", "me"]
        await wait_for(lambda: names(membership) == ["me"], 10)
        world.hanging = set()
        await wait_for(lambda: names(membership) == ["a", "me"], 5)
        assert world.changes == 3
        nursery.cancel_scope.cancel()


async def test_bytes_are_a_sign_of_life(clock: MockClock) -> None:
    world = World(url_of(1))
    world.nodes = {url_of(1): health("a")}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        world.hanging = {url_of(1)}
        for _ in range(30):
            membership.mark_heard("a")
            await trio.sleep(1)
            assert names(membership) == ["a", "me"]
        nursery.cancel_scope.cancel()


async def test_who_sends_bytes_is_not_probed(clock: MockClock) -> None:
    world = World(url_of(1))
    world.nodes = {url_of(1): health("a")}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        before = world.probes
        for _ in range(20):
            membership.mark_heard("a")
            await trio.sleep(1)
        assert world.probes <= before + 1
        await trio.sleep(10)
        assert world.probes > before + 2
        nursery.cancel_scope.cancel()


async def test_a_suspect_that_does_not_answer_is_dead_at_once(clock: MockClock) -> None:
    world = World(url_of(1), url_of(2))
    world.nodes = {url_of(1): health("a"), url_of(2): health("b")}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        del world.nodes[url_of(1)]
        membership.mark_suspect("a")
        membership.mark_suspect("b")
        await wait_for(lambda: names(membership) == ["b", "me"], 1.5)
        nursery.cancel_scope.cancel()


async def test_a_list_may_name_this_node_and_one_node_twice(clock: MockClock) -> None:
    world = World(url_of(1), url_of(2), url_of(9))
    world.nodes = {url_of(1): health("a"), url_of(2): health("a"), url_of(9): ME}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        assert names(membership) == ["a", "me"]
        await trio.sleep(10)
        assert membership.members()[0].url == url_of(1)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"protocol": PROTOCOL + 1}, "protocol"), ({"tenant": "other"}, "tenant"), ({"name": "me"}, "ours")],
)
async def test_who_does_not_belong_to_us_is_left_out_and_said_why(
    clock: MockClock, caplog: pytest.LogCaptureFixture, changes: dict[str, object], why: str
) -> None:
    world = World(url_of(1))
    world.nodes = {url_of(1): health("a", **changes)}  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        await trio.sleep(30)
        assert names(membership) == ["me"]
        [row] = [row for row in membership.member_states() if not row.me]
        assert row.state == "refused"
        assert why in row.why
        nursery.cancel_scope.cancel()
    assert caplog.text.count("is left out") == 1


async def test_of_two_with_one_name_the_first_stays(clock: MockClock) -> None:
    world = World(url_of(1), url_of(2))
    world.nodes = {url_of(2): health("a", "second")}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        world.nodes[url_of(1)] = health("a", "first")
        await trio.sleep(10)
        assert [member.url for member in membership.members() if member.name == "a"] == [url_of(2)]
        assert any("taken by" in row.why for row in membership.member_states())
        nursery.cancel_scope.cancel()


async def test_who_is_no_longer_found_is_gone_at_once(clock: MockClock) -> None:
    world = World(url_of(1), url_of(2))
    world.nodes = {url_of(1): health("a"), url_of(2): health("b")}
    async with trio.open_nursery() as nursery:
        membership = await start(world, nursery)
        assert world.on_candidates is not None
        world.on_candidates(frozenset({url_of(2)}))
        assert names(membership) == ["b", "me"]
        nursery.cancel_scope.cancel()


async def test_a_name_without_addresses_takes_nobody_away(
    clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[object] = [
        ["10.0.0.1", "10.0.0.2"],
        OSError(1, "no such name"),
        [],
        ["10.0.0.2", "fd00::3"],
    ]
    seen: list[frozenset[str]] = []

    async def lookup(host: str, port: int, *, type: int) -> list[object]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        assert isinstance(answer, list)
        return [(10 if ":" in at else 2, 1, 6, "", (at, port)) for at in answer]

    async with trio.open_nursery() as nursery:
        dns = DnsDiscovery("nodes", 7070, "http", resolve_host=lookup)
        nursery.start_soon(functools.partial(dns.run, seen.append))
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert seen == [
        frozenset({"http://10.0.0.1:7070", "http://10.0.0.2:7070"}),
        frozenset({"http://10.0.0.2:7070", "http://[fd00::3]:7070"}),
    ]
    assert caplog.text.count("no such name") == 1
