"""The other nodes' objects, as those nodes list them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusecache.events import Event
from fusecache.peers.coverage import PeerCoverage
from fusecache.peers.errors import PeerError
from fusecache.peers.member import PROTOCOL, Member, NodeInfo
from fusecache.peers.membership.placement import WHOLE_OBJECT, rank_members
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.transport.client import PeerClient
from tests.support.scripted import version

FILE = version("a.safetensors", 1000)
NAMES = ("a", "b", "c")


class Everybody(MembershipTable):
    def __init__(self) -> None:
        super().__init__(NodeInfo("", "", 1, "", PROTOCOL, "0", 0.0), Event())

    def members(self) -> tuple[Member, ...]:
        return tuple(Member(name, f"http://{name}:1", 1 << 30) for name in NAMES)


class ScriptedClient(PeerClient):
    """Nodes whose answers a test makes up."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        super().__init__("me")
        self.answers = answers
        self.asked: list[str] = []

    def request_json(self, url: str, target: str, timeout: float) -> Any:
        name = url.removeprefix("http://").removesuffix(":1")
        self.asked.append(name)
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer


def listing(cached_bytes: int) -> list[dict[str, Any]]:
    return [{"id": FILE.id, "cached_bytes": cached_bytes}]


async def polled(own_name: str, answers: Mapping[str, Any]) -> PeerCoverage:
    client = ScriptedClient(answers)
    coverage = PeerCoverage(own_name, Everybody(), client)
    assert not coverage.is_kept_elsewhere(FILE)
    await coverage.poll()
    assert sorted(client.asked) == [name for name in NAMES if name != own_name]
    return coverage


async def test_nodes_that_answer_nonsense_or_nothing_are_left_out() -> None:
    answers = {"a": listing(7), "b": PeerError("no answer"), "c": [{"id": FILE.id}]}
    coverage = await polled("me", answers)
    assert coverage.bytes_by_node == {"a": {FILE.id: 7}}


async def test_of_two_nodes_that_have_all_of_it_one_keeps_it() -> None:
    first, second, last = (
        member.name for member in rank_members(FILE.id, WHOLE_OBJECT, Everybody().members())
    )
    whole, part = listing(FILE.size), listing(FILE.size - 1)
    assert (await polled(second, {first: whole, last: []})).is_kept_elsewhere(FILE)
    assert not (await polled(first, {second: whole, last: whole})).is_kept_elsewhere(FILE)
    assert not (await polled(second, {first: part, last: whole})).is_kept_elsewhere(FILE)
    assert (await polled(last, {first: part, second: whole})).is_kept_elsewhere(FILE)
