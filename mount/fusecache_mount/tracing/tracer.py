"""The access trace: what programs ask of the mount, one event per request.

An `AccessTracer` is the observer of the channel while somebody traces: it is told when a request was read from the
device and when it is answered, both in the channel's threads. It never waits, never raises, and holds at most `limit`
events until they are fetched (`take_events`); more are counted as lost. Requests that the kernel answers by itself
never come here.

An event is a dict: "t" (seconds since the start, when the request came), "id" (the kernel's number of it, which
grows: events of about the same time may come in another order), "op", "pid" and "comm" of the program, "tid" of the
thread, "path" below the mountpoint, what `requests.parse_arguments` found, "ms" until the answer, "error" (its errno,
or null). That of a mapping is {"op": "map"}: no request says that, so the program's list of mappings is looked at, by
a thread of its own, when it reads a file. (Never by a thread that answers requests: to list them needs a lock that
the program may hold while it waits for the answer.)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fusecache.bounded import BoundedDict
from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.nodeids import inode_number, is_passthrough
from fusecache_mount.kernel.processes import read_tgid
from fusecache_mount.kernel.protocol import Opcode
from fusecache_mount.tracing import requests

_log = logging.getLogger(__name__)

MAX_WAITING_EVENTS = 100_000
"""Events that wait to be fetched: some 50 MiB, and 2 s of page faults at the most that a daemon can answer."""
_MAX_THREADS = 10_000
"""Threads whose program is remembered."""
_MAPPINGS_POLL_SECONDS = 0.25
"""Seconds between two looks at the mappings of a program that reads what it had not mapped yet."""


@dataclass(frozen=True)
class Program:
    """The process that asks, and its name; (0, "") when it is in a pid namespace that we can't see."""

    pid: int
    comm: str


class AccessTracer:
    """One trace. `describe_inode` gives an inode's path below the mountpoint and its size in bytes; `device_number` is
    the mount's "major:minor". `_lock` guards the count of lost events and `_programs`; all else are single
    operations of dictionaries and deques.

    | A request | By | It is |
    |---|---|---|
    | read from the device | `request_received` | pending, if a program made it |
    | pending | `request_answered` | an event that waits to be fetched; lost, if `limit` of them wait |
    | an event | `take_events` | with the client |
    """

    def __init__(
        self,
        describe_inode: Callable[[int], tuple[str, int] | None],
        device_number: str,
        *,
        limit: int = MAX_WAITING_EVENTS,
    ) -> None:
        self._describe_inode = describe_inode
        self._limit = limit
        self._started = time.monotonic()
        self._events: deque[dict[str, Any]] = deque()
        self._lost_events = 0
        self._pending: dict[int, tuple[int, dict[str, Any]]] = {}
        """unique -> opcode, event of what was not answered yet. Single dict operations only."""
        self._programs: BoundedDict[int, Program] = BoundedDict(_MAX_THREADS)
        self._lock = threading.Lock()
        self._mapping_monitor = _MappingMonitor(device_number, self._record_mapping)
        self._has_failed = False

    def start(self) -> None:
        """Begin to look at mappings."""
        self._mapping_monitor.start()

    def stop(self) -> None:
        """Look no more; does not wait."""
        self._mapping_monitor.stop()

    # -- in the channel's threads

    def request_received(self, header: tuple[int, ...], request: memoryview) -> None:
        """A request came: its fuse_in_header in fields, and all of it."""
        try:
            _, opcode, unique, nodeid, _, _, tid, *_ = header
            if requests.is_program_request(opcode):
                self._record_request(opcode, unique, nodeid, tid, request[requests.BODY_OFFSET :])
        except Exception:
            self._log_first_failure()

    def _record_request(self, opcode: int, unique: int, nodeid: int, tid: int, body: memoryview) -> None:
        now = time.monotonic()
        program = self._find_program(tid, must_read_anew=opcode != Opcode.READ)
        path, length = self._describe_inode(inode_number(nodeid)) or ("?", 0)
        event: dict[str, Any] = {
            "t": round(now - self._started, 6),
            "id": unique,
            "op": requests.operation_name(opcode),
            "pid": program.pid,
            "comm": program.comm,
            "tid": tid,
            "path": path or ".",
        }
        event.update(requests.parse_arguments(opcode, body))
        if "name" in event:
            name = event.pop("name")
            event["path"] = f"{path}/{name}" if path else name
        if opcode == Opcode.OPEN:
            event["length"] = length
            event["by"] = "passthrough" if is_passthrough(nodeid) else "daemon"
        elif opcode == Opcode.READ:
            self._mapping_monitor.request_mapping_check(program, inode_number(nodeid), path)
        self._pending[unique] = (opcode, event)

    def request_answered(self, unique: int, status: int, reply: bytes | bytearray = b"") -> None:
        """A request was answered; `status` is 0 or an errno (of either sign)."""
        opcode, event = self._pending.pop(unique, (0, None))
        if event is None:
            return
        try:
            if opcode == Opcode.LOOKUP and not status and protocol.is_negative_lookup(reply):
                status = errno.ENOENT
            event["ms"] = round((time.monotonic() - self._started - event["t"]) * 1000, 3)
            event["error"] = errno.errorcode.get(abs(status), str(abs(status))) if status else None
            self._add_event(event)
        except Exception:
            self._log_first_failure()

    def _find_program(self, tid: int, *, must_read_anew: bool) -> Program:
        """The program of a thread, which waits for our answer and so is still there. A name changes with exec, which
        opens files first: then and at every other request but READ it is looked up anew."""
        with self._lock:
            found = self._programs.get(tid)
        if found is not None and not must_read_anew:
            return found
        program = _read_program(tid)
        if program != found:
            with self._lock:
                self._programs[tid] = program
        return program

    def _record_mapping(self, program: Program, path: str, length: int) -> None:
        self._add_event(
            {
                "t": round(time.monotonic() - self._started, 6),
                "id": 0,
                "op": "map",
                "pid": program.pid,
                "comm": program.comm,
                "tid": program.pid,
                "path": path,
                "size": length,
                "ms": 0.0,
                "error": None,
            }
        )

    def _add_event(self, event: dict[str, Any]) -> None:
        if len(self._events) < self._limit:
            self._events.append(event)
            return
        with self._lock:
            self._lost_events += 1

    def _log_first_failure(self) -> None:
        if not self._has_failed:
            self._has_failed = True
            _log.exception("the trace failed in an unforeseen way; requests are answered all the same")

    # -- by the stream of the client

    def take_events(self, max_events: int) -> list[dict[str, Any]]:
        """Up to `max_events` events, of those that were answered first; in the order in which they came."""
        found: list[dict[str, Any]] = []
        with contextlib.suppress(IndexError):
            while len(found) < max_events:
                found.append(self._events.popleft())
        found.sort(key=lambda event: float(event["t"]))
        return found

    @property
    def lost_events(self) -> int:
        """Events that nobody fetched in time."""
        return self._lost_events


def _read_program(tid: int) -> Program:
    if tid == 0:
        return Program(0, "")
    try:
        pid = read_tgid(tid)
        with open(f"/proc/{pid}/comm", "rb") as file:
            return Program(pid, file.read(64).rstrip(b"\n").decode("utf-8", "replace"))
    except (OSError, ValueError):
        return Program(tid, "")


class _MappingMonitor:
    """Finds out which of the files that it reads a program has mapped. `on_mapping_found(program, path, length)` is
    called once per program and file, from this class's thread.

    | A program and a file | By | It is |
    |---|---|---|
    | unknown, or not looked at for a while | a READ | queued |
    | queued | the thread finds no mapping | to be looked at once more, at a READ in _MAPPINGS_POLL_SECONDS |
    | queued | the thread finds a mapping | told, and not looked at again |
    """

    def __init__(self, device_number: str, on_mapping_found: Callable[[Program, str, int], None]) -> None:
        major, _, minor = device_number.partition(":")
        self._device_number = f"{int(major):02x}:{int(minor):02x}".encode()
        self._on_mapping_found = on_mapping_found
        self._queue: queue.SimpleQueue[tuple[Program, int, str] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Guards `_next_check_times`; a leaf."""
        self._next_check_times: BoundedDict[tuple[int, int], float] = BoundedDict(_MAX_THREADS)
        """(pid, inode number) -> when to look again (infinity: it is mapped)."""
        self._thread = threading.Thread(target=self._check_mappings, name="trace", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)

    def request_mapping_check(self, program: Program, inode: int, path: str) -> None:
        """This program reads this file now: look, soon."""
        now = time.monotonic()
        if not program.pid:
            return
        with self._lock:
            if self._next_check_times.get((program.pid, inode), 0.0) > now:
                return
            self._next_check_times[program.pid, inode] = now + _MAPPINGS_POLL_SECONDS
        self._queue.put((program, inode, path))

    def _check_mappings(self) -> None:
        while (asked := self._queue.get()) is not None:
            program, inode, path = asked
            length = sum(size for number, size in self._list_mapped_files(program.pid) if number == inode)
            if not length:
                continue
            with self._lock:
                was_found = self._next_check_times.get((program.pid, inode)) == float("inf")
                self._next_check_times[program.pid, inode] = float("inf")
            if not was_found:
                self._on_mapping_found(program, path, length)

    def _list_mapped_files(self, pid: int) -> Iterator[tuple[int, int]]:
        """Inode numbers and lengths of the process's mappings of files of this mount."""
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/maps", "rb") as file:
            for line in file:
                span, _, _, device, inode, *_ = line.split(None, 5)
                if device == self._device_number:
                    start, _, stop = span.partition(b"-")
                    yield int(inode), int(stop, 16) - int(start, 16)
