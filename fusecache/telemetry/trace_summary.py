"""The summary of an access trace: per program and file the opens, the bytes, the pattern; probes and refusals. Pure.

`TraceSummary` takes the events of mount/fusecache_mount/tracing/tracer.py in any order, and passes over events that
lack something. Its memory is bounded: it keeps the order of MAX_ORDERED_READS reads for the patterns, and one byte per
granule of a file for the share that was read.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_ORDERED_READS = 2_000_000
"""Reads whose order is remembered, of all programs and files: 48 MiB."""
_MAX_GRANULES = 1 << 18
_MIN_GRANULE_BYTES = 4096
_MAX_STREAMS = 64
"""Places that a program may read on at; more at the same time is random."""
_MAX_NAMES = 10_000
"""Different names that are listed, per program."""


def describe_pattern(reads: Sequence[tuple[int, int]]) -> str:
    """The pattern in which (offset, size) reads, in their order, go through a file: "sequential", "forward, with gaps",
    "backward", "N streams" (at several places at once), "random"; "none" without a read.

    The kernel reads ahead and around faults: then a read here is what it asked for, and not what the program did.
    """
    ends: list[int] = []
    """The offset at which each stream goes on; the stream that was read last comes last."""
    jumps = up = down = switches = highest = 0
    lowest = reads[0][0] if reads else 0
    for offset, size in reads:
        found = next((at for at in reversed(range(len(ends))) if abs(offset - ends[at]) <= size), None)
        if found is None:
            jumps += 1
            up += offset >= highest
            down += offset + size <= lowest
            if len(ends) == _MAX_STREAMS:
                del ends[0]
        else:
            switches += found != len(ends) - 1
            del ends[found]
        ends.append(offset + size)
        highest, lowest = max(highest, offset + size), min(lowest, offset)
    if not reads:
        return "none"
    if 1 < jumps <= _MAX_STREAMS and switches > len(reads) // 4:
        return f"{jumps} streams"
    if jumps <= max(2, len(reads) // 50):
        gapless = sum(size for _, size in reads) >= 0.9 * (highest - lowest)
        return "sequential" if gapless else "forward, with gaps"
    if up >= 0.9 * jumps:
        return "forward, with gaps"
    return "backward" if down >= 0.9 * (jumps - 1) else "random"


class _GranuleMap:
    """The granules (equal parts) of a file that were read."""

    def __init__(self, length: int) -> None:
        self._file_length = length
        self._granule_bytes = _MIN_GRANULE_BYTES
        while self._granule_bytes * _MAX_GRANULES < length:
            self._granule_bytes *= 2
        self._granules = bytearray(-(-length // self._granule_bytes))

    def mark_read(self, offset: int, size: int) -> None:
        stop = min(offset + size, self._file_length)
        if 0 <= offset < stop:
            first, last = offset // self._granule_bytes, -(-stop // self._granule_bytes)
            self._granules[first:last] = b"\1" * (last - first)

    @property
    def covered_bytes(self) -> int:
        return min(self._granules.count(1) * self._granule_bytes, self._file_length)


@dataclass
class _FileSummary:
    first_seen: float
    opens: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    length: int | None = None
    reads: int = 0
    bytes_read: int = 0
    wait_ms: float = 0.0
    mapped_bytes: int = 0
    has_hidden_reads: bool = False
    """An open was served with passthrough: its reads are not seen."""
    granules: _GranuleMap | None = None
    read_log: array[int] = field(default_factory=lambda: array("Q"))
    """id, offset, size of each read."""

    def set_length(self, length: Any) -> None:
        if isinstance(length, int) and self.length is None:
            self.length, self.granules = length, _GranuleMap(length)

    def to_dict(self, path: str) -> dict[str, Any]:
        triples = sorted(zip(self.read_log[::3], self.read_log[1::3], self.read_log[2::3], strict=True))
        covered = (
            None if self.granules is None or not self.length else self.granules.covered_bytes / self.length
        )
        return {
            "path": path,
            "first": self.first_seen,
            "opens": self.opens,
            "flags": sorted(self.flags),
            "length": self.length,
            "reads": self.reads,
            "bytes": self.bytes_read,
            "share": None if covered is None else round(covered, 4),
            "pattern": describe_pattern([(offset, size) for _, offset, size in triples]),
            "mapped": self.mapped_bytes,
            "wait_ms": round(self.wait_ms, 3),
            "hidden": self.has_hidden_reads,
        }


@dataclass
class _ProgramSummary:
    first_seen: float
    names: dict[str, None] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    files: dict[str, _FileSummary] = field(default_factory=dict)
    looked_up: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    failed: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def to_dict(self, pid: int) -> dict[str, Any]:
        files = sorted(self.files.items(), key=lambda item: item[1].first_seen)
        return {
            "pid": pid,
            "names": list(self.names),
            "first": self.first_seen,
            "requests": dict(self.requests.most_common()),
            "files": [each.to_dict(path) for path, each in files],
            "looked_at": _count_rows(self.looked_up),
            "missing": _count_rows(self.missing),
            "failed": [
                {"op": op, "path": path, "error": error, "count": count}
                for (op, path, error), count in self.failed.items()
            ],
        }


def _count_rows(names: Counter[str]) -> list[dict[str, Any]]:
    return [{"path": path, "count": count} for path, count in names.items()]


class TraceSummary:
    """The sum of all events that `add_events` got. Not thread-safe."""

    def __init__(self) -> None:
        self._programs: dict[int, _ProgramSummary] = {}
        self._pending_lookups: dict[int, tuple[_ProgramSummary, str]] = {}
        """tid -> the name that it looked up last: a step of a path, the first part of an open, or all it wanted."""
        self._event_count = 0
        self._remaining_reads = MAX_ORDERED_READS

    def add_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Add events to the sum, in any order."""
        for event in events:
            self._event_count += 1
            op, path, tid = str(event.get("op")), str(event.get("path")), int(event.get("tid", 0))
            if not tid and op in ("release", "releasedir"):
                continue  # the kernel sends these when the last program that had the file open has closed it
            program = self._get_program(event)
            program.requests[op] += 1
            if op == "read":
                self._add_read(program, path, event)
                continue
            self._follow_lookup(program, tid, op, path, event.get("error"))
            if event.get("error"):
                self._add_failure(program, op, path, str(event["error"]))
            elif op == "open":
                self._add_open(program, path, event)
            elif op == "map":
                self._get_file(program, path, event).mapped_bytes = int(event.get("size", 0))

    def _get_program(self, event: Mapping[str, Any]) -> _ProgramSummary:
        pid = int(event.get("pid", 0))
        program = self._programs.get(pid)
        if program is None:
            program = self._programs[pid] = _ProgramSummary(float(event.get("t", 0.0)))
        program.names.setdefault(str(event.get("comm", "")))
        return program

    def _get_file(self, program: _ProgramSummary, path: str, event: Mapping[str, Any]) -> _FileSummary:
        return program.files.setdefault(path, _FileSummary(float(event.get("t", 0.0))))

    def _add_open(self, program: _ProgramSummary, path: str, event: Mapping[str, Any]) -> None:
        file = self._get_file(program, path, event)
        file.opens += 1
        file.flags[str(event.get("flags"))] += 1
        file.has_hidden_reads |= event.get("by") == "passthrough"
        file.set_length(event.get("length"))

    def _add_read(self, program: _ProgramSummary, path: str, event: Mapping[str, Any]) -> None:
        if event.get("error"):
            self._add_failure(program, "read", path, str(event["error"]))
            return
        file = self._get_file(program, path, event)
        offset, size = int(event.get("offset", 0)), int(event.get("size", 0))
        file.reads += 1
        file.wait_ms += float(event.get("ms", 0.0))
        if file.length is not None:
            size = max(0, min(size, file.length - offset))
        file.bytes_read += size
        if file.granules is not None:
            file.granules.mark_read(offset, size)
        if self._remaining_reads > 0:
            self._remaining_reads -= 1
            file.read_log.extend((int(event.get("id", 0)), offset, size))

    def _add_failure(self, program: _ProgramSummary, op: str, path: str, error: str) -> None:
        if op == "lookup" and error == "ENOENT":
            if path in program.missing or len(program.missing) < _MAX_NAMES:
                program.missing[path] += 1
        elif len(program.failed) < _MAX_NAMES:
            program.failed[op, path, error] += 1

    def _follow_lookup(self, program: _ProgramSummary, tid: int, op: str, path: str, error: Any) -> None:
        before = self._pending_lookups.pop(tid, None)
        if before is not None:
            self._finish_lookup(*before, op, path)
        if op == "lookup" and not error:
            self._pending_lookups[tid] = (program, path)

    def _finish_lookup(self, program: _ProgramSummary, name: str, op: str, path: str) -> None:
        """Count the lookup of `name` by a program whose next request is `op` of `path`, unless the lookup was only a
        step towards that request."""
        on_the_way = op == "lookup" and path.startswith(f"{name}/")
        if on_the_way or (op != "lookup" and path == name):
            return
        if name in program.looked_up or len(program.looked_up) < _MAX_NAMES:
            program.looked_up[name] += 1

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values: programs in the order of their first request, their files in the order of the
        first open or read. Ends the lookups that are still open."""
        for program, name in self._pending_lookups.values():
            self._finish_lookup(program, name, "", "")
        self._pending_lookups.clear()
        programs = sorted(self._programs.items(), key=lambda item: item[1].first_seen)
        return {"events": self._event_count, "programs": [each.to_dict(pid) for pid, each in programs]}
