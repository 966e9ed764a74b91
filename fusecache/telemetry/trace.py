"""What an access trace shows: per program and file the opens, the bytes, the pattern; probes and refusals. Pure.

`Summary` takes the events of mount/trace.py in any order, and is careful with them: what is missing is passed over. Its
memory is bounded: it keeps `READS` reads for the patterns, and one byte per granule of a file for what was read.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

READS = 2_000_000
"""Reads whose order is remembered, of all programs and files: 48 MiB."""
_GRANULES = 1 << 18
_PAGE = 4096
_STREAMS = 64
"""Places that a program may read on at; more at the same time is random."""
_NAMES = 10_000
"""Different names that are listed, per program."""


def pattern(reads: Sequence[tuple[int, int]]) -> str:
    """How (offset, size) reads, in their order, go through a file: "sequential", "forward, with gaps", "backward",
    "N streams" (at several places at once), "random".

    The kernel reads ahead and around faults: then a read here is what it asked for, and not what the program did.
    """
    ends: list[int] = []
    """Where each stream is, the latest last."""
    jumps = up = down = switches = highest = 0
    lowest = reads[0][0] if reads else 0
    for offset, size in reads:
        found = next((at for at in reversed(range(len(ends))) if abs(offset - ends[at]) <= size), None)
        if found is None:
            jumps += 1
            up += offset >= highest
            down += offset + size <= lowest
            if len(ends) == _STREAMS:
                del ends[0]
        else:
            switches += found != len(ends) - 1
            del ends[found]
        ends.append(offset + size)
        highest, lowest = max(highest, offset + size), min(lowest, offset)
    if not reads:
        return "none"
    if 1 < jumps <= _STREAMS and switches > len(reads) // 4:
        return f"{jumps} streams"
    if jumps <= max(2, len(reads) // 50):
        gapless = sum(size for _, size in reads) >= 0.9 * (highest - lowest)
        return "sequential" if gapless else "forward, with gaps"
    if up >= 0.9 * jumps:
        return "forward, with gaps"
    return "backward" if down >= 0.9 * (jumps - 1) else "random"


class _Covered:
    """Which granules of a file were read."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._size = _PAGE
        while self._size * _GRANULES < length:
            self._size *= 2
        self._read = bytearray(-(-length // self._size))

    def add(self, offset: int, size: int) -> None:
        stop = min(offset + size, self._length)
        if 0 <= offset < stop:
            first, last = offset // self._size, -(-stop // self._size)
            self._read[first:last] = b"\1" * (last - first)

    @property
    def bytes(self) -> int:
        return min(self._read.count(1) * self._size, self._length)


@dataclass
class _File:
    first: float
    opens: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    length: int | None = None
    reads: int = 0
    bytes: int = 0
    wait_ms: float = 0.0
    mapped: int = 0
    hidden: bool = False
    """An open was served with passthrough: its reads are not seen."""
    covered: _Covered | None = None
    order: array[int] = field(default_factory=lambda: array("Q"))
    """id, offset, size of each read."""

    def know(self, length: Any) -> None:
        if isinstance(length, int) and self.length is None:
            self.length, self.covered = length, _Covered(length)

    def result(self, path: str) -> dict[str, Any]:
        triples = sorted(zip(self.order[::3], self.order[1::3], self.order[2::3], strict=True))
        covered = None if self.covered is None or not self.length else self.covered.bytes / self.length
        return {
            "path": path,
            "first": self.first,
            "opens": self.opens,
            "flags": sorted(self.flags),
            "length": self.length,
            "reads": self.reads,
            "bytes": self.bytes,
            "share": None if covered is None else round(covered, 4),
            "pattern": pattern([(offset, size) for _, offset, size in triples]),
            "mapped": self.mapped,
            "wait_ms": round(self.wait_ms, 3),
            "hidden": self.hidden,
        }


@dataclass
class _Program:
    first: float
    names: dict[str, None] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    files: dict[str, _File] = field(default_factory=dict)
    looked: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    failed: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def result(self, pid: int) -> dict[str, Any]:
        files = sorted(self.files.items(), key=lambda item: item[1].first)
        return {
            "pid": pid,
            "names": list(self.names),
            "first": self.first,
            "requests": dict(self.requests.most_common()),
            "files": [each.result(path) for path, each in files],
            "looked_at": _counted(self.looked),
            "missing": _counted(self.missing),
            "failed": [
                {"op": op, "path": path, "error": error, "count": count}
                for (op, path, error), count in self.failed.items()
            ],
        }


def _counted(names: Counter[str]) -> list[dict[str, Any]]:
    return [{"path": path, "count": count} for path, count in names.items()]


class Summary:
    """The events so far, summed up. `add` them, then ask for the `result`."""

    def __init__(self) -> None:
        self._programs: dict[int, _Program] = {}
        self._walking: dict[int, tuple[_Program, str]] = {}
        """tid -> the name that it looked up last: a step of a path, the first part of an open, or all it wanted."""
        self._events = 0
        self._room = READS

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take more events."""
        for event in events:
            self._events += 1
            op, path, tid = str(event.get("op")), str(event.get("path")), int(event.get("tid", 0))
            if not tid and op in ("release", "releasedir"):
                continue  # sent by the kernel, for whoever had it open
            program = self._program(event)
            program.requests[op] += 1
            if op == "read":
                self._read(program, path, event)
                continue
            self._step(program, tid, op, path, event.get("error"))
            if event.get("error"):
                self._failed(program, op, path, str(event["error"]))
            elif op == "open":
                self._open(program, path, event)
            elif op == "map":
                self._file(program, path, event).mapped = int(event.get("size", 0))

    def _program(self, event: Mapping[str, Any]) -> _Program:
        pid = int(event.get("pid", 0))
        program = self._programs.get(pid)
        if program is None:
            program = self._programs[pid] = _Program(float(event.get("t", 0.0)))
        program.names.setdefault(str(event.get("comm", "")))
        return program

    def _file(self, program: _Program, path: str, event: Mapping[str, Any]) -> _File:
        return program.files.setdefault(path, _File(float(event.get("t", 0.0))))

    def _open(self, program: _Program, path: str, event: Mapping[str, Any]) -> None:
        file = self._file(program, path, event)
        file.opens += 1
        file.flags[str(event.get("flags"))] += 1
        file.hidden |= event.get("by") == "passthrough"
        file.know(event.get("length"))

    def _read(self, program: _Program, path: str, event: Mapping[str, Any]) -> None:
        if event.get("error"):
            self._failed(program, "read", path, str(event["error"]))
            return
        file = self._file(program, path, event)
        offset, size = int(event.get("offset", 0)), int(event.get("size", 0))
        file.reads += 1
        file.wait_ms += float(event.get("ms", 0.0))
        if file.length is not None:
            size = max(0, min(size, file.length - offset))
        file.bytes += size
        if file.covered is not None:
            file.covered.add(offset, size)
        if self._room > 0:
            self._room -= 1
            file.order.extend((int(event.get("id", 0)), offset, size))

    def _failed(self, program: _Program, op: str, path: str, error: str) -> None:
        if op == "lookup" and error == "ENOENT":
            if path in program.missing or len(program.missing) < _NAMES:
                program.missing[path] += 1
        elif len(program.failed) < _NAMES:
            program.failed[op, path, error] += 1

    def _step(self, program: _Program, tid: int, op: str, path: str, error: Any) -> None:
        before = self._walking.pop(tid, None)
        if before is not None:
            self._arrived(*before, op, path)
        if op == "lookup" and not error:
            self._walking[tid] = (program, path)

    def _arrived(self, program: _Program, name: str, op: str, path: str) -> None:
        """A program looked `name` up and then did this: was the name all it wanted?"""
        on_the_way = op == "lookup" and path.startswith(f"{name}/")
        if on_the_way or (op != "lookup" and path == name):
            return
        if name in program.looked or len(program.looked) < _NAMES:
            program.looked[name] += 1

    def result(self) -> dict[str, Any]:
        """Programs in the order of their first request; their files in the order of the first open or read."""
        for program, name in self._walking.values():
            self._arrived(program, name, "", "")
        self._walking.clear()
        programs = sorted(self._programs.items(), key=lambda item: item[1].first)
        return {"events": self._events, "programs": [each.result(pid) for pid, each in programs]}
