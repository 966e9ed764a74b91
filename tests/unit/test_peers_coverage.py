"""When what is on the disk is taken from other nodes instead: by what they have, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from fusecache.peers.coverage import PeerSupplyEstimate
from fusecache.peers.exchange.block_source import PeerBlockSource
from fusecache.peers.exchange.outgoing import OutgoingBytes
from fusecache.peers.member import Member
from fusecache.peers.transport.client import PeerClient
from fusecache.store.interface import BlockStore
from fusecache.store.tier_placement import MeasuredRates
from fusecache.types import ObjectVersion
from tests.support.scripted import version

BLOCK = 4096
STRIPE = 4 * BLOCK
FILE = version("model.safetensors", 20 * STRIPE)


class Disk:
    """Of a store, what is asked here."""

    block_size = BLOCK
    read: float | None = 100.0
    estimate_peer_throughput: Callable[[ObjectVersion], float | None] | None = None

    def measured_rates(self, *, wait_for_measurement: bool = False) -> MeasuredRates:
        return MeasuredRates(disk_read=self.read)


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
def exchange(monkeypatch: pytest.MonkeyPatch) -> PeerBlockSource:
    made = PeerBlockSource(
        "me",
        Everybody("me", "a", "b", "c"),
        PeerClient("me"),
        {},
        stripe_bytes=STRIPE,
        peer_workers=1,
        concurrency=1,
        outgoing=OutgoingBytes(),
        fallback_requests=1,
    )
    monkeypatch.setattr(made, "peak_throughput", lambda: 1000.0)
    return made


@pytest.fixture
def elsewhere(disk: Disk, exchange: PeerBlockSource) -> PeerSupplyEstimate:
    return PeerSupplyEstimate(
        "me", Everybody("me", "a", "b", "c"), exchange, PeerClient("me"), cast(BlockStore, disk)
    )


def everybody_has_it(elsewhere: PeerSupplyEstimate, *names: str) -> None:
    elsewhere.update_coverage({name: {FILE.id: FILE.size} for name in names})


def test_the_store_asks_it(disk: Disk, elsewhere: PeerSupplyEstimate) -> None:
    assert disk.estimate_peer_throughput == elsewhere.estimate_peer_throughput
    assert elsewhere.estimate_peer_throughput(FILE) is None  # nobody has it
    everybody_has_it(elsewhere, "a", "b", "c")
    assert elsewhere.estimate_peer_throughput(FILE) == 1000.0
    assert elsewhere.estimate_peer_throughput(version("other.safetensors", 5)) is None
    disk.read = 900.0
    assert elsewhere.estimate_peer_throughput(FILE) is None
    disk.read = None
    assert elsewhere.estimate_peer_throughput(FILE) is None


def test_the_origin_is_not_to_be_asked_for_what_a_node_lacks(elsewhere: PeerSupplyEstimate) -> None:
    everybody_has_it(elsewhere, "a", "c")
    assert elsewhere.estimate_peer_throughput(FILE) is None  # some of its 20 stripes would be for b to give


def test_it_matters_where_the_disk_is_slower_or_the_others_are_not_known(
    disk: Disk, exchange: PeerBlockSource, elsewhere: PeerSupplyEstimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elsewhere.is_needed()
    disk.read = 900.0
    assert not elsewhere.is_needed()
    monkeypatch.setattr(exchange, "peak_throughput", lambda: None)
    assert elsewhere.is_needed()
    disk.read = None
    assert not elsewhere.is_needed()
