"""The parts of a store that all its open objects share."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusecache.store.attestation import AttestationPolicy
from fusecache.store.corruption import CorruptionLog
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.disk.ledger import Ledger
from fusecache.store.health import DiskHealth
from fusecache.store.records import ObjectTable
from fusecache.store.space import Space
from fusecache.types import ObjectId


@dataclass(frozen=True)
class VerifiedBlocks:
    """Which blocks of objects that are closed now this process had verified, so that none is hashed twice.

    An entry is a fingerprint of the files (FilesHolder) with a byte per block, and holds as long as the fingerprint is
    that of the files: blocks that were changed behind the store's back are hashed again. Each use is one operation on
    the dictionary, so that it needs no lock."""

    entries: dict[ObjectId, tuple[tuple[int, int, int], bytearray]] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreContext:
    """The parts of the store that its open objects use. `trusts_boot`: blocks that were verified since the machine
    started need no verification, if the object was closed cleanly."""

    cache_directory: CacheDirectory
    ledger: Ledger
    health: DiskHealth
    space: Space
    object_table: ObjectTable
    corruption_log: CorruptionLog
    verified_blocks: VerifiedBlocks
    block_size: int
    boot_id: bytes
    trusts_boot: bool
    attestation_policy: AttestationPolicy | None = None
