"""What all open objects of one store share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusecache.store.files import Layout
from fusecache.store.health import Health
from fusecache.store.ledger import Ledger
from fusecache.store.seals import Seals
from fusecache.store.space import Space
from fusecache.types import ObjectId

if TYPE_CHECKING:
    from fusecache.store.object import StoredObject


@dataclass
class Memory:
    """Which blocks of objects that are closed now this process had verified, so that none is hashed twice.
    An entry holds for one file (`generation`) as long as no process cleared a block of it (`repairs`) and
    nobody wrote to it (the data file's mtime_ns): what changed behind our back is hashed again."""

    entries: dict[ObjectId, tuple[tuple[int, int, int], bytearray]] = field(default_factory=dict)


@dataclass
class Shared:
    """The parts of the store, and what its objects tell it."""

    layout: Layout
    ledger: Ledger
    health: Health
    space: Space
    block_size: int
    boot_id: bytes
    trust_boot: bool
    memory: Memory
    closed: Callable[[StoredObject], None]
    corrupt: Callable[[StoredObject, int, bool], None]
    record: Callable[[StoredObject], None]
    quarantined: Callable[[StoredObject], None]
    seals: Seals | None = None
    writing: Callable[[int], AbstractContextManager[None]] = lambda _length: nullcontext()
    """Entered around writes to data files."""
    buffers: threading.local = field(default_factory=threading.local)
