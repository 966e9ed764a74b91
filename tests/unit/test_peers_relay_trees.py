"""A cluster so large that not all nodes ask the owner of a stripe: a few nodes, and a limit that is set low."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from fusecache.peers.exchange import policy
from fusecache.peers.member import Member
from fusecache.peers.transport.wire import BlockRequest
from tests.support.inside import BLOCK, DATA, DEADLINE, FILE, STRIPE, STRIPES, Node, running
from tests.support.scripted import ScriptedOrigin

COUNT = 12


@pytest.fixture
def origin() -> ScriptedOrigin:
    return ScriptedOrigin([FILE], chunk=BLOCK)


@pytest.fixture
async def nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: ScriptedOrigin, nursery: trio.Nursery
) -> Any:
    monkeypatch.setattr(policy, "MAX_DIRECT_NODES", 4)
    async with running([f"n{number}" for number in range(COUNT)], tmp_path, origin, nursery) as made:
        yield made


async def read_all(nodes: list[Node]) -> None:
    async def read(node: Node) -> None:
        with trio.fail_after(DEADLINE):
            assert await trio.to_thread.run_sync(node.read) == DATA

    async with trio.open_nursery() as readers:
        for node in nodes:
            readers.start_soon(read, node)


async def test_one_copy_comes_through_the_deputies(
    nodes: list[Node], origin: ScriptedOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[tuple[str, int], set[str]] = {}
    for node in nodes:

        async def noted(
            request: BlockRequest, node: Node = node, begin_response: Any = node.block_service.begin_response
        ) -> Any:
            if not request.stored_only and not request.hops:
                asked.setdefault((node.name, request.blocks.start // (STRIPE // BLOCK)), set()).add(
                    request.caller
                )
            return await begin_response(request)

        monkeypatch.setattr(node.block_service, "begin_response", noted)
    await read_all(nodes)
    assert sum(length for _, _, length in origin.reads) == FILE.size
    assert [node.block_source.stats.fallbacks for node in nodes] == [0] * COUNT
    near = 1 + policy.sub_owner_count(COUNT)
    for stripe in range(STRIPES):
        order = [member.name for member in nodes[0].state.rankings.ranking_of(FILE.id, stripe)]
        owner, between = order[0], order[1:near]
        assert asked[owner, stripe] == set(between)
        far = {node.name for node in nodes} - set(order[:near])
        assert far == set().union(*(asked.get((name, stripe), set()) for name in between)) - set(between)


async def test_a_deputy_that_is_gone_costs_no_second_copy(nodes: list[Node], origin: ScriptedOrigin) -> None:
    gone = nodes[0].state.rankings.ranking_of(FILE.id, 0)[1].name
    members = tuple(
        Member(member.name, "http://127.0.0.1:9", 1 << 30) if member.name == gone else member
        for member in nodes[0].everybody.found
    )
    for node in nodes:
        node.everybody.found = members
    owned = [
        number
        for number in range(STRIPES)
        if nodes[0].state.rankings.ranking_of(FILE.id, number)[0].name == gone
    ]
    await read_all([node for node in nodes if node.name != gone])
    assert 0 <= sum(length for _, _, length in origin.reads) - FILE.size <= len(owned) * STRIPE
    if not owned:
        assert not any(node.block_source.stats.fallbacks for node in nodes)
