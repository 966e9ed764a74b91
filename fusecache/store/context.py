"""What all open objects of one store share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusecache.store.attestation import AttestationPolicy
from fusecache.store.disk.files import CacheDirectory
from fusecache.store.disk.ledger import Ledger
from fusecache.store.health import DiskHealth
from fusecache.store.space import Space
from fusecache.types import ObjectId

if TYPE_CHECKING:
    from fusecache.store.object import StoredObject


@dataclass
class VerifiedBlocks:
    """Which blocks of objects that are closed now this process had verified, so that none is hashed twice.
    An entry holds for one file (`generation`) as long as no process cleared a block of it (`repairs`) and
    nobody wrote to it (the data file's mtime_ns): what changed behind our back is hashed again."""

    entries: dict[ObjectId, tuple[tuple[int, int, int], bytearray]] = field(default_factory=dict)


@dataclass
class StoreContext:
    """The parts of the store, and what its objects tell it."""

    cache_directory: CacheDirectory
    ledger: Ledger
    health: DiskHealth
    space: Space
    block_size: int
    boot_id: bytes
    trusts_boot: bool
    verified_blocks: VerifiedBlocks
    close_object: Callable[[StoredObject], None]
    count_corrupt_block: Callable[[StoredObject, int, bool], None]
    record_object: Callable[[StoredObject], None]
    record_quarantined: Callable[[StoredObject], None]
    attestation_policy: AttestationPolicy | None = None
    hash_buffers: threading.local = field(default_factory=threading.local)
