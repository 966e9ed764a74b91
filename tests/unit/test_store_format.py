"""The bytes on the disk. A change here breaks every cache directory: it needs a new FORMAT_VERSION."""

from __future__ import annotations

import struct

import pytest
import xxhash

from fusecache.store.disk import format
from fusecache.types import ObjectVersion

VERSION = ObjectVersion("s3://b/p", "a/ü.bin", '"e"', 10_000, 5)
IDENTITY = b'["s3://b/p","a/\\u00fc.bin","\\"e\\"",10000,5]'
BOOT = bytes(range(16))
QUARANTINED = format.AttestationRecord(
    format.AttestationState.QUARANTINED, bytes(range(100, 132)), b"unsigned"
)


def blocks_file() -> bytes:
    header = format.BlocksFileHeader(4096, 10_000, 0x1122334455667788, format.pack_identity(VERSION))
    return format.pack_blocks_file(header, format.BlocksFileState(BOOT, 9, 2, True, True, 3, QUARANTINED))


def test_blocks_file_bytes_are_pinned() -> None:
    fixed = b"FCBLOCKS" + struct.pack("<IIQQQ", 3, 4096, 10_000, 0x1122334455667788, len(IDENTITY))
    digest = struct.pack("<Q", xxhash.xxh3_64_intdigest(fixed + IDENTITY))
    state = BOOT + struct.pack("<QIBBB", 9, 2, 1, 1, 3) + b"\2" + bytes(range(100, 132)) + b"unsigned"
    expected = (fixed + digest + state).ljust(128, b"\0") + bytes(3 * 8) + IDENTITY
    assert blocks_file() == expected
    assert xxhash.xxh3_64_hexdigest(expected) == "1fcf8b89fbce0904"


def test_offsets_of_what_is_written_in_place() -> None:
    assert (format.BOOT_ID_OFFSET, format.LAST_USE_OFFSET, format.REPAIRS_OFFSET) == (48, 64, 72)
    assert (format.CLEAN_OFFSET, format.PINNED_OFFSET, format.ACCESSES_OFFSET) == (76, 77, 78)
    assert format.ATTESTATION_OFFSET == 79
    assert [format.checksum_offset(b) for b in (0, 1, 10)] == [128, 136, 208]
    assert format.pack_checksum(0x0102) == b"\x02\x01\0\0\0\0\0\0"
    assert format.pack_checksum(0) == b"\x01\0\0\0\0\0\0\0"


def test_blocks_file_is_read_back() -> None:
    header = format.parse_header(blocks_file())
    assert header is not None
    assert (header.block_size, header.object_size, header.block_count) == (4096, 10_000, 3)
    assert format.parse_identity(header.identity) == VERSION
    assert format.parse_state(blocks_file()) == format.BlocksFileState(BOOT, 9, 2, True, True, 3, QUARANTINED)
    assert format.file_overhead(header) == 4096 + (12_288 - 10_000)


def test_an_unknown_mark_is_none() -> None:
    data = bytearray(blocks_file())
    data[format.ATTESTATION_OFFSET] = 7
    assert format.parse_state(bytes(data)).attestation == format.AttestationRecord()


def test_checksums_may_be_set_without_touching_the_header() -> None:
    data = bytearray(blocks_file())
    data[128:152] = b"\xff" * 24
    assert format.parse_header(bytes(data)) is not None


@pytest.mark.parametrize("cut", [0, 1, 127, 128, 150])
def test_a_torn_blocks_file_is_refused(cut: int) -> None:
    assert format.parse_header(blocks_file()[:cut]) is None


@pytest.mark.parametrize("position", [0, 8, 12, 16, 24, 32, 40, 47, 128 + 24, -1])
def test_a_flipped_bit_in_what_never_changes_is_refused(position: int) -> None:
    data = bytearray(blocks_file())
    data[position] ^= 1
    assert format.parse_header(bytes(data)) is None


@pytest.mark.parametrize("text", [b"", b"{}", b"[1,2,3,4,5]", b'["a","b","c","d","e"]', b"\xff", b'["a"]'])
def test_a_foreign_identity_is_refused(text: bytes) -> None:
    assert format.parse_identity(text) is None


def test_format_file_bytes_are_pinned() -> None:
    assert format.pack_format(1 << 20) == b"fusecache store 3\nblock_size 1048576\n"
    assert format.parse_format(format.pack_format(4096)) == 4096
    for text in (b"", b"fusecache store 3\nblock_size x\n", b"\xff"):
        assert format.parse_format(text) is None


@pytest.mark.parametrize("version", [1, 2, 4, 99])
def test_a_directory_of_another_version_is_not_taken_for_ours(version: int) -> None:
    assert format.parse_format(b"fusecache store %d\nblock_size 4096\n" % version) is None
    ledger = bytearray(format.pack_ledger(is_counted=True))
    struct.pack_into("<I", ledger, 8, version)
    assert not format.is_valid_ledger(ledger)
    blocks = bytearray(blocks_file())
    struct.pack_into("<I", blocks, 8, version)
    assert format.parse_header(blocks) is None


def test_ledger_bytes_are_pinned() -> None:
    ledger = bytearray(format.pack_ledger(is_counted=True))
    assert ledger == (b"FCLEDGER" + struct.pack("<IIqI", 3, 255, 0, 1)).ljust(8192, b"\0")
    assert format.is_valid_ledger(ledger)
    assert format.is_ledger_counted(ledger)
    slot = format.LedgerSlot(100, 30, 7, 5, 42)
    assert slot.pack() == struct.pack("<QQQII", 100, 30, 7, 5, 42)
    assert format.ledger_slot_offset(0) == 32
    for index in (0, 1):
        offset = format.ledger_slot_offset(index)
        ledger[offset : offset + 32] = slot.pack()
        assert format.parse_slot(ledger, index) == slot
    assert format.ledger_slot_offset(254) == 8192 - 32
    assert format.sum_slots(memoryview(ledger)) == format.LedgerSlot(200, 60, 14, 10, 0)
    assert format.pack_correction(-2) == b"\xfe" + b"\xff" * 7
    assert not format.is_valid_ledger(b"FCLEDGER")
    assert not format.is_valid_ledger(bytes(8192))
