"""The bytes of the FUSE messages that the channel touches, as include/uapi/linux/fuse.h lays them out."""

from __future__ import annotations

import struct

from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.nodeids import PASSTHROUGH_BIT, inode_number, is_passthrough, passthrough_nodeid
from fusecache_mount.kernel.protocol import Opcode


def init_request(flags: int, flags2: int) -> bytes:
    body = struct.pack("<IIIII44x", 7, 45, 131072, flags, flags2)
    return protocol.IN_HEADER.pack(40 + len(body), Opcode.INIT, 2, 0, 0, 0, 0, 0, 0) + body


def init_reply(status: int = 0) -> bytearray:
    body = struct.pack("<IIIIHHIIHHIII24x", 7, 38, 131072, 1 << 22, 12, 9, 1 << 20, 1, 256, 0, 0, 0, 0)
    return bytearray(protocol.OUT_HEADER.pack(16 + len(body), status, 2) + body)


def test_the_sizes_of_the_headers() -> None:
    assert protocol.IN_HEADER.size == 40
    assert protocol.OUT_HEADER.size == 16
    assert protocol.BACKING_MAP.size == 16


def test_the_ioctls() -> None:
    assert protocol.IOC_BACKING_OPEN == 0x4010E501
    assert protocol.IOC_BACKING_CLOSE == 0x4004E502


def test_what_the_kernel_offers() -> None:
    both = protocol.INIT2_PASSTHROUGH | protocol.INIT2_HAS_RESEND
    assert protocol.supports_passthrough(init_request(protocol.INIT_EXT, both))
    assert protocol.supports_resend(init_request(protocol.INIT_EXT, both))
    assert not protocol.supports_passthrough(init_request(0, both))
    assert not protocol.supports_passthrough(init_request(protocol.INIT_EXT, 0))
    assert not protocol.supports_passthrough(b"\0" * 56)


def test_init_asks_for_passthrough_and_deep_queues() -> None:
    reply = init_reply()
    protocol.rewrite_init(reply, protocol.InitLimits(128, 254), passthrough=True)
    fields = struct.unpack_from("<IIIIHHIIHHII", reply, 16)
    assert fields[3] == 1 << 22 | protocol.INIT_ASYNC_DIO | protocol.INIT_EXT
    assert fields[4:6] == (128, 96)
    assert fields[6] == 4096
    assert fields[8] == 254
    assert fields[10:] == (protocol.INIT2_PASSTHROUGH, 1)


def test_init_without_passthrough() -> None:
    reply = init_reply()
    protocol.rewrite_init(reply, protocol.InitLimits(64), passthrough=False)
    fields = struct.unpack_from("<IIIIHHIIHHII", reply, 16)
    assert fields[3] == 1 << 22 | protocol.INIT_ASYNC_DIO
    assert fields[10:] == (0, 0)


def test_a_failed_init_is_left_alone() -> None:
    reply = init_reply(-71)
    before = bytes(reply)
    protocol.rewrite_init(reply, protocol.InitLimits(64), passthrough=True)
    assert bytes(reply) == before


def test_open_becomes_passthrough() -> None:
    reply = bytearray(
        protocol.OUT_HEADER.pack(32, 0, 7) + struct.pack("<QIi", 99, protocol.FOPEN_KEEP_CACHE, 0)
    )
    protocol.rewrite_open(reply, 5)
    assert struct.unpack_from("<QIi", reply, 16) == (99, protocol.FOPEN_PASSTHROUGH, 5)


def test_both_nodeids_show_one_inode_number() -> None:
    passthrough = passthrough_nodeid(1234)
    entry = struct.pack("<QQQQII", passthrough, 0, 0, 0, 0, 0) + struct.pack("<Q80x", passthrough)
    lookup = bytearray(protocol.OUT_HEADER.pack(16 + len(entry), 0, 1) + entry)
    protocol.rewrite_inode_numbers(lookup, Opcode.LOOKUP)
    assert struct.unpack_from("<Q", lookup, 16)[0] == passthrough
    assert struct.unpack_from("<Q", lookup, 56)[0] == 1234

    attributes = struct.pack("<QII", 0, 0, 0) + struct.pack("<Q80x", passthrough)
    getattr_ = bytearray(protocol.OUT_HEADER.pack(16 + len(attributes), 0, 1) + attributes)
    protocol.rewrite_inode_numbers(getattr_, Opcode.GETATTR)
    assert struct.unpack_from("<Q", getattr_, 32)[0] == 1234


def test_inode_numbers_in_a_directory() -> None:
    body = b""
    for number, name in enumerate([b"a", b"name-of-17-bytes!", b"12345678"], start=10):
        passthrough = passthrough_nodeid(number)
        entry = struct.pack("<QQQQII", passthrough, 0, 0, 0, 0, 0) + struct.pack("<Q80x", passthrough)
        dirent = struct.pack("<QQII", passthrough, 1, len(name), 8) + name
        body += entry + dirent + b"\0" * (-len(dirent) % 8)
    reply = bytearray(protocol.OUT_HEADER.pack(16 + len(body), 0, 1) + body)
    protocol.rewrite_inode_numbers(reply, Opcode.READDIRPLUS)
    at, found = 16, []
    while at < len(reply):
        name_length = struct.unpack_from("<I", reply, at + 128 + 16)[0]
        found.append(
            (struct.unpack_from("<Q", reply, at + 40)[0], struct.unpack_from("<Q", reply, at + 128)[0])
        )
        assert struct.unpack_from("<Q", reply, at)[0] & PASSTHROUGH_BIT
        at += 128 + (24 + name_length + 7) // 8 * 8
    assert found == [(10, 10), (11, 11), (12, 12)]


def test_errors_are_not_rewritten() -> None:
    for opcode in (Opcode.LOOKUP, Opcode.GETATTR, Opcode.READDIRPLUS):
        reply = bytearray(protocol.error_reply(3, 2))
        protocol.rewrite_inode_numbers(reply, opcode)
        assert bytes(reply) == struct.pack("<IiQ", 16, -2, 3)


def test_notifications() -> None:
    assert protocol.resend_notification() == struct.pack("<IiQ", 16, 7, 0)
    assert protocol.inval_entry_notification(1, b"ab") == struct.pack("<IiQQII3s", 35, 3, 0, 1, 2, 0, b"ab\0")


def test_nodeids() -> None:
    passthrough = passthrough_nodeid(5)
    assert is_passthrough(passthrough)
    assert not is_passthrough(5)
    assert inode_number(passthrough) == inode_number(5) == 5
    assert passthrough < 1 << 63


def test_what_a_trace_has_the_kernel_forget() -> None:
    entry = struct.pack("<QQQQII", 8, 0, 60, 50, 6, 5) + bytes(88)
    for opcode in (Opcode.LOOKUP, Opcode.READDIRPLUS):
        name = struct.pack("<QQII", 8, 1, 3, 8) + b"abc" + bytes(5) if opcode == Opcode.READDIRPLUS else b""
        reply = bytearray(protocol.OUT_HEADER.pack(0, 0, 1) + (entry + name) * (1 + bool(name)))
        protocol.rewrite_as_uncached(reply, opcode)
        for at in range(16, len(reply), len(entry + name)):
            assert struct.unpack_from("<QQQQII", reply, at) == (8, 0, 0, 50, 0, 5)
    opened = bytearray(protocol.OUT_HEADER.pack(32, 0, 1) + struct.pack("<QIi", 8, 0b1010, 3))
    protocol.rewrite_as_uncached(opened, Opcode.OPEN)
    assert struct.unpack_from("<QIi", opened, 16) == (8, 0b1000, 3)
    failed = bytearray(protocol.OUT_HEADER.pack(16, -2, 1) + entry)
    assert bytes(failed[16:]) == entry
    protocol.rewrite_as_uncached(failed, Opcode.LOOKUP)
    assert bytes(failed[16:]) == entry


def test_an_entry_that_is_to_expire() -> None:
    assert protocol.inval_entry_notification(7, b"ab", expire_only=True) == (
        struct.pack("<IiQ", 35, 3, 0) + struct.pack("<QII", 7, 2, 1) + b"ab\0"
    )
    assert protocol.supports_expire(init_request(protocol.INIT_EXT, 1 << 3))
    assert not protocol.supports_expire(init_request(protocol.INIT_EXT, 0))
