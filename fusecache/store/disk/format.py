"""The on-disk format of the store: every byte that outlives a process is laid out here, and nowhere else.

    <cache>/format    "fusecache store 3\\nblock_size 1048576\\n"
    <cache>/lock      flock'ed (LOCK_EX) around creation, replacement and eviction of an object's files
    <cache>/ledger    space accounting of all processes: a header (LEDGER_*) and a slot per process
    <cache>/index/    diskcache (SQLite), JSON values: a mirror for a fast start, rebuilt from the files
    <cache>/data/<2 hex>/<object id>.data      sparse, exactly the object's size
    <cache>/data/<2 hex>/<object id>.blocks    header, one xxh3_64 per block (0: absent), identity as JSON

Integers are little-endian. Files are read through shared mappings and written with pwrite, so that a full or
failing disk is an OSError and never a SIGBUS. Pure: no I/O in this module.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import dataclass

import xxhash

from fusecache.blocks import block_count
from fusecache.checksum import nonzero_checksum
from fusecache.types import ObjectVersion

FORMAT_VERSION = 3
PAGE_SIZE = 4096
"""Space is accounted in these units: what ext4, XFS and tmpfs allocate by."""

BLOCKS_MAGIC = b"FCBLOCKS"
HEADER_SIZE = 128
CHECKSUM_SIZE = 8

# magic, version, block size, object size, generation, identity bytes | then the xxh3 of those and the
# identity
_FIXED = struct.Struct("<8sIIQQQ")
_FIXED_CHECKSUM = struct.Struct("<Q")
# boot id, last use in ns since the epoch, repairs, clean, pinned, accesses
_STATE = struct.Struct("<16sQIBBB")
STATE_OFFSET = _FIXED.size + _FIXED_CHECKSUM.size
BOOT_ID_OFFSET = STATE_OFFSET
LAST_USE_OFFSET = STATE_OFFSET + 16
REPAIRS_OFFSET = STATE_OFFSET + 24
CLEAN_OFFSET = STATE_OFFSET + 28
PINNED_OFFSET = STATE_OFFSET + 29
ACCESSES_OFFSET = STATE_OFFSET + 30
# state, sha256 of the whole object, anchor
_ATTESTATION = struct.Struct("<B32s8s")
ATTESTATION_OFFSET = STATE_OFFSET + _STATE.size

LEDGER_MAGIC = b"FCLEDGER"
LEDGER_SLOTS = 255
LEDGER_SLOT_SIZE = 32
LEDGER_SIZE = (LEDGER_SLOTS + 1) * LEDGER_SLOT_SIZE
# magic, version, slots, correction, whether the slots were ever counted against the files
_LEDGER_HEADER = struct.Struct("<8sIIqI")
_LEDGER_SLOT = struct.Struct("<QQQII")
LEDGER_CORRECTION_OFFSET = 16
LEDGER_COUNTED_OFFSET = 24


@dataclass(frozen=True)
class BlocksFileHeader:
    """The part of a .blocks file that never changes. `generation` is drawn at random when the file is made; `identity`
    names the object version."""

    block_size: int
    object_size: int
    generation: int
    identity: bytes

    @property
    def block_count(self) -> int:
        """Number of blocks, and so of checksums."""
        return block_count(self.object_size, self.block_size)

    @property
    def file_size(self) -> int:
        """Length in bytes of the .blocks file."""
        return HEADER_SIZE + CHECKSUM_SIZE * self.block_count + len(self.identity)


class AttestationState(enum.IntEnum):
    """The outcome of inspecting an object as a whole; a block's checksum says nothing of where they come from."""

    NONE = 0
    ATTESTED = 1
    """All blocks are there, and their sha256 is what a manifest says."""
    QUARANTINED = 2
    """Their sha256 is not what the manifest said; they were thrown away."""


@dataclass(frozen=True)
class AttestationRecord:
    """The finding about an object as a whole: the outcome, the sha256 (32 bytes) that the object was found to have, and
    the anchor (8 bytes), which stands for the keys that were believed."""

    state: AttestationState = AttestationState.NONE
    sha256: bytes = bytes(32)
    anchor: bytes = bytes(8)

    def pack(self) -> bytes:
        """The bytes at ATTESTATION_OFFSET."""
        return _ATTESTATION.pack(self.state, self.sha256, self.anchor)


@dataclass(frozen=True)
class BlocksFileState:
    """The part of a .blocks file's header that changes.

    `boot_id` and `is_clean` say that every block with a checksum was verified or written during that boot, and that
    the last process to have the object open closed it. `repairs` counts the blocks that were found bad and cleared.
    `accesses` (0-3) and `last_use_ns` feed eviction.
    """

    boot_id: bytes = bytes(16)
    last_use_ns: int = 0
    repairs: int = 0
    is_clean: bool = False
    is_pinned: bool = False
    accesses: int = 0
    attestation: AttestationRecord = AttestationRecord()

    def pack(self) -> bytes:
        """The bytes at STATE_OFFSET."""
        return (
            _STATE.pack(
                self.boot_id,
                self.last_use_ns,
                self.repairs & 0xFFFFFFFF,
                self.is_clean,
                self.is_pinned,
                self.accesses,
            )
            + self.attestation.pack()
        )


@dataclass(frozen=True)
class LedgerSlot:
    """Sums of one process for the directory, in bytes: committed and evicted since the ledger began (they outlive the
    process), reserved now, and `pending`: the part of committed whose checksums may not be set yet (both are void as
    soon as no process holds the slot's lock). `pid` is for people, and 0 in a slot that was never used."""

    committed: int = 0
    evicted: int = 0
    reserved: int = 0
    pending: int = 0
    pid: int = 0

    def pack(self) -> bytes:
        """The 32 bytes of the slot."""
        pending = min(self.pending, 0xFFFFFFFF)
        return _LEDGER_SLOT.pack(self.committed, self.evicted, self.reserved, pending, self.pid)


def pack_format(block_size: int) -> bytes:
    """Contents of the `format` file, for blocks of `block_size` bytes."""
    return f"fusecache store {FORMAT_VERSION}\nblock_size {block_size}\n".encode()


def parse_format(text: bytes) -> int | None:
    """Block size in bytes of a `format` file of this version, else None."""
    lines = text.decode("utf-8", "replace").split("\n")
    if len(lines) < 2 or lines[0] != f"fusecache store {FORMAT_VERSION}":
        return None
    name, _, value = lines[1].partition(" ")
    return int(value) if name == "block_size" and value.isdecimal() else None


def pack_identity(version: ObjectVersion) -> bytes:
    """The object version that a .blocks file belongs to, so that the store can be read without its index."""
    fields = [version.origin, version.key, version.etag, version.size, version.mtime_ns]
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def parse_identity(text: bytes) -> ObjectVersion | None:
    """Reverse of `pack_identity`; None for anything else."""
    try:
        origin, key, etag, size, mtime_ns = json.loads(text)
    except (ValueError, TypeError):
        return None
    if not all(isinstance(x, str) for x in (origin, key, etag)):
        return None
    if not (isinstance(size, int) and isinstance(mtime_ns, int)):
        return None
    return ObjectVersion(origin, key, etag, size, mtime_ns)


def pack_blocks_file(header: BlocksFileHeader, state: BlocksFileState) -> bytes:
    """A new .blocks file with every block absent."""
    fixed = _FIXED.pack(
        BLOCKS_MAGIC,
        FORMAT_VERSION,
        header.block_size,
        header.object_size,
        header.generation,
        len(header.identity),
    )
    digest = xxhash.xxh3_64_intdigest(fixed + header.identity)
    head = (fixed + _FIXED_CHECKSUM.pack(digest) + state.pack()).ljust(HEADER_SIZE, b"\0")
    return head + bytes(CHECKSUM_SIZE * header.block_count) + header.identity


def parse_header(data: bytes | memoryview) -> BlocksFileHeader | None:
    """Header of a whole .blocks file; None: it is torn, foreign, of another version or of a wrong length."""
    if len(data) < HEADER_SIZE:
        return None
    magic, version, block_size, object_size, generation, length = _FIXED.unpack_from(data)
    if magic != BLOCKS_MAGIC or version != FORMAT_VERSION or not block_size or length > len(data):
        return None
    identity = bytes(data[len(data) - length :])
    header = BlocksFileHeader(block_size, object_size, generation, identity)
    (digest,) = _FIXED_CHECKSUM.unpack_from(data, _FIXED.size)
    if len(data) != header.file_size:
        return None
    if digest != xxhash.xxh3_64_intdigest(bytes(data[: _FIXED.size]) + identity):
        return None
    return header


def parse_state(data: bytes | memoryview) -> BlocksFileState:
    """State in a .blocks file of which at least HEADER_SIZE bytes are given."""
    boot_id, last_use_ns, repairs, clean, pinned, accesses = _STATE.unpack_from(data, STATE_OFFSET)
    attestation_state, sha256, anchor = _ATTESTATION.unpack_from(data, ATTESTATION_OFFSET)
    attestation = (
        AttestationRecord(AttestationState(attestation_state), sha256, anchor)
        if attestation_state in AttestationState._value2member_map_
        else AttestationRecord()
    )
    return BlocksFileState(
        boot_id, last_use_ns, repairs, bool(clean), bool(pinned), min(accesses, 3), attestation
    )


def checksum_offset(block: int) -> int:
    """Where in a .blocks file the checksum of `block` is; a multiple of 8."""
    return HEADER_SIZE + CHECKSUM_SIZE * block


def pack_checksum(checksum: int) -> bytes:
    """The bytes at checksum_offset of a block that is present; 0 would mean absent and is recorded as 1."""
    return nonzero_checksum(checksum).to_bytes(CHECKSUM_SIZE, "little")


def file_overhead(header: BlocksFileHeader) -> int:
    """Bytes that an object takes on the disk beside its blocks: the .blocks file and the tail of the last
    page."""
    return -(-header.file_size // PAGE_SIZE) * PAGE_SIZE + -header.object_size % PAGE_SIZE


def pack_ledger(*, is_counted: bool) -> bytes:
    """A new ledger; `is_counted` says that its sums, which are 0, are right: the directory holds no objects."""
    return _LEDGER_HEADER.pack(LEDGER_MAGIC, FORMAT_VERSION, LEDGER_SLOTS, 0, is_counted).ljust(
        LEDGER_SIZE, b"\0"
    )


def is_valid_ledger(data: bytes | memoryview) -> bool:
    """Whether these are the bytes of a ledger of this version."""
    if len(data) != LEDGER_SIZE:
        return False
    magic, version, slots, _, _ = _LEDGER_HEADER.unpack_from(data)
    return bool(magic == LEDGER_MAGIC and version == FORMAT_VERSION and slots == LEDGER_SLOTS)


def ledger_correction(data: bytes | memoryview) -> int:
    """Bytes, signed, that the last recount found the slots to be off by."""
    return int(_LEDGER_HEADER.unpack_from(data)[3])


def is_ledger_counted(data: bytes | memoryview) -> bool:
    """Whether the ledger was ever counted against the files; until then its sums mean nothing."""
    return bool(_LEDGER_HEADER.unpack_from(data)[4])


def pack_correction(correction: int) -> bytes:
    """The bytes at LEDGER_CORRECTION_OFFSET."""
    return struct.pack("<q", correction)


def sum_slots(data: memoryview) -> LedgerSlot:
    """The sums over all slots of a ledger that others may be writing to. Slots are taken in ascending order:
    the first that was never used is the end."""
    committed = evicted = reserved = pending = 0
    for offset in range(LEDGER_SLOT_SIZE, LEDGER_SIZE, LEDGER_SLOT_SIZE):
        slot = _LEDGER_SLOT.unpack_from(data, offset)
        # twice the same: not read in the middle of a write, where bytes on their way from reserved to
        # committed would be in neither
        for _ in range(100):
            last, slot = slot, _LEDGER_SLOT.unpack_from(data, offset)
            if slot == last:
                break
        if not slot[4]:
            break
        committed += slot[0]
        evicted += slot[1]
        reserved += slot[2]
        pending += slot[3]
    return LedgerSlot(committed, evicted, reserved, pending)


def ledger_slot_offset(slot: int) -> int:
    """Where slot `slot` (from 0) is in the ledger."""
    return (slot + 1) * LEDGER_SLOT_SIZE


def parse_slot(data: bytes | memoryview, slot: int) -> LedgerSlot:
    """Slot `slot` of a ledger."""
    return LedgerSlot(*_LEDGER_SLOT.unpack_from(data, ledger_slot_offset(slot)))
