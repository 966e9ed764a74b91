"""Unattested objects: filled and verified like any other, given to nobody before they are attested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusecache.store.attestation import AttestationPolicy
from fusecache.store.disk import files as fs
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.disk.format import AttestationState
from fusecache.store.object import StoredObject
from fusecache.store.store import Store
from tests.unit.test_store import BLOCK, LIMIT, OVERHEAD, content, data_of, fill, flip, version

POLICY = AttestationPolicy(b"unsigned", lambda found: found.key == "exempt")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    stores: list[Store] = []

    def build(policy: AttestationPolicy | None = POLICY) -> Store:
        store = Store(
            tmp_path / "cache", limit=LIMIT, free_floor=0, block_size=BLOCK, attestation_policy=policy
        )
        stores.append(store)
        return store

    yield build
    for store in stores:
        store.close()


def sha256(stored: StoredObject) -> bytes:
    return hashlib.sha256(content(stored.version)).digest()


def attested(store: Store) -> StoredObject:
    stored = store.open(version())
    fill(stored)
    stored.attestation.mark_attested(sha256(stored))
    return stored


def states(store: Store) -> dict[str, AttestationState]:
    return {info.version.key: info.attestation_state for info in store.objects()}


def test_nothing_of_an_unattested_object_is_servable(make: Any) -> None:
    store = make()
    stored = store.open(version())
    fill(stored, range(3))
    stored.attestation.mark_attested(sha256(stored))  # it is not all here: that can't be
    assert stored.is_unattested
    fill(stored, range(3, 4))
    assert stored.is_complete
    assert not stored.is_servable
    assert not stored.is_range_servable(0, 1)
    stored.attestation.mark_attested(sha256(stored))
    assert stored.is_servable
    assert stored.is_range_servable(0, stored.version.size)
    assert states(store) == {"k": AttestationState.ATTESTED}
    stored.close()


def test_without_a_policy_and_for_exempt_versions_nothing_is_unattested(make: Any) -> None:
    exempt = make().open(version("exempt"))
    plain = make(None).open(version())
    for stored in (exempt, plain):
        fill(stored)
        assert stored.is_servable
        stored.close()


def test_an_attestation_outlives_a_restart_and_holds_for_its_anchor_only(make: Any) -> None:
    store = make()
    attested(store).close()
    store.close()
    again = make()
    stored = again.open(version())
    assert not stored.is_unattested
    assert not stored.is_servable  # its blocks are verified first, as ever
    for block in range(4):
        assert stored.verify_block(block)
    assert stored.is_servable
    assert states(again) == {"k": AttestationState.ATTESTED}
    stored.close()
    again.close()
    other = make(AttestationPolicy(b"somekey.", POLICY.is_exempt)).open(version())
    assert other.is_unattested
    other.close()


def test_a_bad_block_voids_the_attestation(make: Any, tmp_path: Path) -> None:
    store = make()
    attested(store).close()
    store.close()
    (data,) = (tmp_path / "cache").rglob("*.data")
    flip(data, BLOCK + 5)
    again = make()
    stored = again.open(version())
    assert [stored.verify_block(block) for block in range(4)] == [True, False, True, True]
    assert stored.is_unattested
    fill(stored, range(1, 2))
    assert not stored.is_servable
    stored.close()
    again.close()
    last = make().open(version())
    assert last.is_unattested
    last.close()


def test_quarantine_drops_the_bytes_and_keeps_the_record(make: Any) -> None:
    store = make()
    stored = store.open(version())
    fill(stored)
    used = store.usage().used
    stored.attestation.enter_quarantine(b"q" * 32)
    assert stored.is_retired
    assert stored.attestation.quarantine_sha256 == b"q" * 32
    assert not stored.is_servable
    assert store.usage().used == used - 4 * BLOCK
    assert (store.usage().objects_quarantined, store.usage().objects_partial) == (1, 0)
    stored.close()
    assert states(store) == {"k": AttestationState.QUARANTINED}
    again = store.open(version())
    assert again.attestation.quarantine_sha256 == b"q" * 32
    assert again.cached_bytes() == 0
    again.close()
    store.close()
    restarted = make()
    assert states(restarted) == {"k": AttestationState.QUARANTINED}
    found = restarted.open(version())
    assert found.attestation.quarantine_sha256 == b"q" * 32
    assert restarted.open(version(etag="new")).attestation.quarantine_sha256 is None
    found.close()
    assert restarted.evict(version().id) == OVERHEAD
    assert restarted.open(version()).attestation.quarantine_sha256 is None


def test_a_lifted_quarantine_is_an_object_like_any_other(make: Any) -> None:
    store = make()
    stored = store.open(version())
    fill(stored)
    stored.attestation.enter_quarantine(b"q" * 32)
    stored.close()
    again = store.open(version())
    again.attestation.lift_quarantine()
    assert again.attestation.quarantine_sha256 is None
    assert again.is_unattested
    fill(again)
    again.attestation.mark_attested(sha256(again))
    assert again.is_servable
    again.close()
    assert states(store) == {"k": AttestationState.ATTESTED}


def test_a_quarantine_leaves_the_file_of_who_still_serves_it_alone(make: Any) -> None:
    """Another mount on the directory that does not ask for manifests: what it has open stays as it is."""
    other = make(None).open(version())
    fill(other)
    stored = make().open(version())
    for block in range(4):
        stored.verify_block(block)
    stored.attestation.enter_quarantine(b"q" * 32)
    assert other.is_servable
    assert data_of(other) == content(version())
    stored.close()
    other.close()


def test_a_quarantine_does_not_replace_what_another_process_made_since(make: Any, tmp_path: Path) -> None:
    store = make()
    stored = store.open(version())
    fill(stored)
    cache_directory = CacheDirectory(tmp_path / "cache")
    with cache_directory.exclusive_lock():
        fs.unlink_object(cache_directory, version().id)
    fresh = make().open(version())
    fill(fresh, range(1))
    stored.attestation.enter_quarantine(b"q" * 32)
    summary = fs.read_summary(cache_directory, version().id)
    assert summary is not None
    assert summary.state.attestation.state is AttestationState.NONE
    assert summary.present_bytes == BLOCK
    cache_directory.close()
    stored.close()
    fresh.close()
