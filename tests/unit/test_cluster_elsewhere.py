"""When what is on the disk is taken from other nodes instead: by what they have, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from fusecache.cluster.elsewhere import Elsewhere
from fusecache.cluster.exchange import Exchange
from fusecache.peers.client import PeerClient
from fusecache.peers.member import Member
from fusecache.store.interface import BlockStore
from fusecache.store.paths import Paces
from fusecache.types import ObjectVersion
from tests.support.scripted import version

BLOCK = 4096
STRIPE = 4 * BLOCK
FILE = version("model.safetensors", 20 * STRIPE)


class Disk:
    """Of a store, what is asked here."""

    block_size = BLOCK
    read: float | None = 100.0
    elsewhere: Callable[[ObjectVersion], float | None] | None = None

    def paces(self, *, wait: bool = False) -> Paces:
        return Paces(read=self.read)


class Everybody:
    def __init__(self, *names: str) -> None:
        self._members = tuple(Member(name, f"http://{name}:1", 1 << 30) for name in names)

    def members(self) -> tuple[Member, ...]:
        return self._members

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not asked for")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> Exchange:
    made = Exchange(
        "me", Everybody("me", "a", "b", "c"), PeerClient("me"), {}, stripe=STRIPE, crew=1, concurrency=1, fallback=1
    )  # fmt: skip
    monkeypatch.setattr(made, "pace", lambda: 1000.0)
    return made


@pytest.fixture
def elsewhere(disk: Disk, exchange: Exchange) -> Elsewhere:
    return Elsewhere("me", Everybody("me", "a", "b", "c"), exchange, PeerClient("me"), cast(BlockStore, disk))


def everybody_has_it(elsewhere: Elsewhere, *names: str) -> None:
    elsewhere.seen({name: {FILE.id: FILE.size} for name in names})


def test_the_store_asks_it(disk: Disk, elsewhere: Elsewhere) -> None:
    assert disk.elsewhere == elsewhere.pace_of
    assert elsewhere.pace_of(FILE) is None  # nobody has it
    everybody_has_it(elsewhere, "a", "b", "c")
    assert elsewhere.pace_of(FILE) == 1000.0
    assert elsewhere.pace_of(version("other.safetensors", 5)) is None
    disk.read = 900.0
    assert elsewhere.pace_of(FILE) is None
    disk.read = None
    assert elsewhere.pace_of(FILE) is None


def test_the_origin_is_not_to_be_asked_for_what_a_node_lacks(elsewhere: Elsewhere) -> None:
    everybody_has_it(elsewhere, "a", "c")
    assert elsewhere.pace_of(FILE) is None  # some of its 20 stripes would be for b to give


def test_it_matters_where_the_disk_is_slower_or_the_others_are_not_known(
    disk: Disk, exchange: Exchange, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elsewhere.matters()
    disk.read = 900.0
    assert not elsewhere.matters()
    monkeypatch.setattr(exchange, "pace", lambda: None)
    assert elsewhere.matters()
    disk.read = None
    assert not elsewhere.matters()
