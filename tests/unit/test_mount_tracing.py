"""The access trace: requests in words, the tracer's events and bounds, and what the summary makes of them."""

from __future__ import annotations

import errno
import os
import random
import struct
from typing import Any

import pytest

from fusecache.cli.trace import escape_unprintable, summary_lines
from fusecache.telemetry.trace_summary import TraceSummary, describe_pattern
from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.nodeids import passthrough_nodeid
from fusecache_mount.kernel.protocol import Opcode
from fusecache_mount.tracing.tracer import AccessTracer

MIB = 1 << 20
TREE = {1: ("", 0), 7: ("llama", 0), 8: ("llama/a.safetensors", 3 * MIB)}


def header(opcode: int, unique: int, nodeid: int, tid: int | None = None) -> tuple[int, ...]:
    return (0, opcode, unique, nodeid, 0, 0, os.getpid() if tid is None else tid, 0, 0)


def request(body: bytes) -> memoryview:
    return memoryview(bytes(40) + body)


def tracer(limit: int = 100) -> AccessTracer:
    return AccessTracer(TREE.get, "0:39", limit=limit)


def traced(opcode: int, nodeid: int, body: bytes, status: int = 0, reply: bytes = b"") -> dict[str, Any]:
    trace = tracer()
    trace.request_received(header(opcode, 10, nodeid), request(body))
    assert trace.take_events(10) == []
    trace.request_answered(10, status, reply)
    (event,) = trace.take_events(10)
    return event


def test_a_read() -> None:
    event = traced(Opcode.READ, 8, struct.pack("<QQIIQII", 8, MIB, 4096, 0, 0, 0, 0))
    assert (event["op"], event["path"], event["offset"], event["size"]) == (
        "read",
        "llama/a.safetensors",
        MIB,
        4096,
    )
    assert event["pid"] == event["tid"] == os.getpid()
    assert event["comm"]
    assert event["error"] is None
    assert event["ms"] >= 0


def test_an_open_says_who_serves_it_and_how_long_the_file_is() -> None:
    flags = struct.pack("<II", os.O_RDONLY | os.O_NONBLOCK, 0)
    event = traced(Opcode.OPEN, 8, flags)
    assert (event["flags"], event["length"], event["by"]) == ("O_RDONLY|O_NONBLOCK", 3 * MIB, "daemon")
    assert traced(Opcode.OPEN, passthrough_nodeid(8), flags)["by"] == "passthrough"


def test_a_name_that_does_not_exist() -> None:
    absent = protocol.OUT_HEADER.pack(144, 0, 10) + bytes(128)
    event = traced(Opcode.LOOKUP, 7, b"adapter_config.json\0", 0, absent)
    assert (event["path"], event["error"]) == ("llama/adapter_config.json", "ENOENT")
    there = protocol.OUT_HEADER.pack(144, 0, 10) + struct.pack("<Q", 8) + bytes(120)
    assert traced(Opcode.LOOKUP, 1, b"llama\0", 0, there)["error"] is None


@pytest.mark.parametrize(
    ("opcode", "body", "found"),
    [
        (
            Opcode.CREATE,
            struct.pack("<IIII", os.O_WRONLY | os.O_CREAT, 0, 0, 0) + b"new\0",
            {"op": "create", "path": "llama/new", "flags": "O_WRONLY|O_CREAT"},
        ),
        (9, struct.pack("<II", 0, 0) + b"d\0", {"op": "mkdir", "path": "llama/d"}),
        (10, b"gone\0", {"op": "unlink", "path": "llama/gone"}),
        (45, struct.pack("<QII", 1, 0, 0) + b"old\0new\0", {"op": "rename", "path": "llama/old"}),
        (21, struct.pack("<II", 1, 0) + b"user.x\0v", {"op": "setxattr", "xattr": "user.x"}),
        (
            22,
            struct.pack("<II", 255, 0) + b"security.selinux\0",
            {"op": "getxattr", "xattr": "security.selinux"},
        ),
        (39, struct.pack("<QIIQII", 7, 0, 0x5401, 0, 0, 0), {"op": "ioctl", "command": "0x5401"}),
        (46, struct.pack("<QQII", 7, 5, 4, 0), {"op": "lseek", "offset": 5, "whence": "SEEK_HOLE"}),
        (44, struct.pack("<QQIIQII", 7, 0, 4096, 0, 0, 0, 0), {"op": "readdir", "path": "llama"}),
        (17, b"", {"op": "statfs"}),
        (99, b"", {"op": "request 99"}),
        (Opcode.READ, b"short", {"op": "read", "path": "llama"}),
    ],
)
def test_other_requests(opcode: int, body: bytes, found: dict[str, Any]) -> None:
    event = traced(opcode, 7, body, -errno.EROFS)
    assert found.items() <= event.items()
    assert event["error"] == "EROFS"


def test_what_the_kernel_does_on_its_own_account_is_no_event() -> None:
    trace = tracer()
    for opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INIT, Opcode.INTERRUPT):
        trace.request_received(header(opcode, 3, 7), request(b""))
        trace.request_answered(3, 0)
    assert trace.take_events(10) == []


def test_the_root_and_an_inode_that_is_gone_have_names_too() -> None:
    assert traced(Opcode.GETATTR, 1, bytes(16))["path"] == "."
    assert traced(Opcode.GETATTR, 99, bytes(16))["path"] == "?"
    assert traced(Opcode.LOOKUP, 1, b"x\0")["path"] == "x"


def test_events_that_nobody_fetches_are_counted_and_not_kept() -> None:
    trace = tracer(limit=5)
    for unique in range(12):
        trace.request_received(header(17, unique, 1), request(b""))
        trace.request_answered(unique, 0)
    assert len(trace.take_events(100)) == 5
    assert trace.lost_events == 7
    trace.request_received(header(17, 20, 1), request(b""))
    trace.request_answered(20, 0)
    assert len(trace.take_events(100)) == 1
    assert trace.lost_events == 7


def test_an_answer_to_a_request_from_before_is_passed_over() -> None:
    trace = tracer()
    trace.request_answered(5, 0)
    assert trace.take_events(10) == []


def test_threads_that_are_gone_or_in_another_namespace() -> None:
    trace = tracer()
    trace.request_received(header(17, 1, 1, tid=0), request(b""))
    trace.request_answered(1, 0)
    trace.request_received(header(17, 2, 1, tid=2**22 - 1), request(b""))
    trace.request_answered(2, 0)
    first, second = trace.take_events(10)
    assert (first["pid"], first["comm"]) == (0, "")
    assert (second["pid"], second["comm"]) == (2**22 - 1, "")


# -- patterns


def test_patterns() -> None:
    page = 4096
    forward = [(n * MIB, MIB) for n in range(50)]
    assert describe_pattern([]) == "none"
    assert describe_pattern(forward) == "sequential"
    assert describe_pattern([(0, 4096), *forward[2:]]) == "sequential"  # a header, then the rest
    assert describe_pattern([(0, 4096), *forward[10:]]) == "forward, with gaps"
    assert describe_pattern([(n * 10 * MIB, MIB) for n in range(50)]) == "forward, with gaps"
    assert describe_pattern([(n * 10 * MIB, MIB) for n in reversed(range(50))]) == "backward"
    places = [place * 100 * MIB + n * page for n in range(50) for place in range(8)]
    assert describe_pattern([(offset, page) for offset in places]) == "8 streams"
    shuffled = random.Random(1).sample(range(100_000), 500)
    assert describe_pattern([(n * page, page) for n in shuffled]) == "random"


# -- the summary


def event(op: str, path: str, **more: Any) -> dict[str, Any]:
    return {"op": op, "path": path, "pid": 5, "tid": 5, "comm": "python3", "t": 0.5, "error": None} | more


def summed(*events: dict[str, Any]) -> dict[str, Any]:
    summary = TraceSummary()
    summary.add_events(events)
    return summary.to_dict()


def test_a_file_that_was_read_in_part() -> None:
    found = summed(
        event("open", "m", flags="O_RDONLY", length=4 * MIB, t=1.0),
        # answered in another order than asked
        *(event("read", "m", id=id_, offset=id_ * 4096, size=4096) for id_ in (1, 0, 2, 3)),
        event("read", "m", id=4, offset=0, size=4096),
        event("map", "m", size=4 * MIB),
    )
    (program,) = found["programs"]
    (file,) = program["files"]
    assert program["pid"] == 5
    assert program["names"] == ["python3"]
    assert program["requests"] == {"read": 5, "open": 1, "map": 1}
    assert (file["opens"], file["reads"], file["bytes"]) == (1, 5, 5 * 4096)
    assert file["share"] == round(4 * 4096 / (4 * MIB), 4)
    assert file["mapped"] == 4 * MIB
    assert file["pattern"] == "sequential"


def test_reads_behind_the_end_count_as_what_there_is() -> None:
    (program,) = summed(
        event("open", "m", flags="O_RDONLY", length=1000), event("read", "m", id=1, offset=0, size=4096)
    )["programs"]
    assert program["files"][0]["bytes"] == 1000
    assert program["files"][0]["share"] == 1.0


def test_a_file_that_was_open_before_has_no_share() -> None:
    (program,) = summed(event("read", "m", id=1, offset=0, size=4096))["programs"]
    assert program["files"][0]["share"] is None
    assert program["files"][0]["bytes"] == 4096


def test_probes_refusals_and_looks() -> None:
    (program,) = summed(
        event("lookup", "llama"),
        event("lookup", "llama/config.json"),  # a stat
        event("lookup", "llama"),
        event("lookup", "llama/missing", error="ENOENT"),
        event("lookup", "llama/missing", error="ENOENT"),
        event("lookup", "llama"),
        event("lookup", "llama/m"),
        event("open", "llama/m", flags="O_RDONLY", length=1),
        event("create", "new", error="EROFS"),
        event("lookup", "llama"),  # the last one, a stat
    )["programs"]
    assert program["looked_at"] == [{"path": "llama/config.json", "count": 1}, {"path": "llama", "count": 1}]
    assert program["missing"] == [{"path": "llama/missing", "count": 2}]
    assert program["failed"] == [{"op": "create", "path": "new", "error": "EROFS", "count": 1}]
    assert [file["path"] for file in program["files"]] == ["llama/m"]


def test_programs_and_files_come_in_the_order_of_their_first_use() -> None:
    found = summed(
        event("open", "second", pid=9, tid=9, t=3.0, comm="b", length=1),
        event("open", "z", t=1.0, length=1),
        event("open", "a", t=2.0, length=1),
        event("open", "a", t=4.0, length=1, comm="renamed"),
    )
    assert [program["pid"] for program in found["programs"]] == [5, 9]
    assert [file["path"] for file in found["programs"][0]["files"]] == ["z", "a"]
    assert found["programs"][0]["names"] == ["python3", "renamed"]


def test_a_release_belongs_to_no_program() -> None:
    assert summed(event("release", "m", pid=0, tid=0, comm=""))["programs"] == []


def test_reads_with_passthrough_are_said_to_be_hidden() -> None:
    found = summed(event("open", "m", flags="O_RDONLY", by="passthrough", length=1))
    assert found["programs"][0]["files"][0]["hidden"]
    text = "\n".join(summary_lines({"seconds": 1.0, "lost": 3, **found}))
    assert "reads not seen" in text
    assert "3 more were lost" in text


def test_names_do_nothing_to_a_terminal() -> None:
    assert escape_unprintable("a\x1b[2Jb\n\udcff") == "a\\x1b[2Jb\\n\\udcff"
    found = summed(event("lookup", "evil\x1b[31m", error="ENOENT"))
    assert all("\x1b" not in line for line in summary_lines({"seconds": 0.0, "lost": 0, **found}))
