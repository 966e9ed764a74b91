"""Which files are open, kept where a restarted daemon finds it: one JSON line per change, in the runtime
directory (a tmpfs). No fsync: it has to outlive the daemon, not the machine, and neither do the mounts.

A line is {"o": nodeid, "v": version, "s": source, "b": backing id} for an open and {"r": nodeid} for a release.
Torn or foreign lines are skipped. Thread-safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from fusecache.types import ObjectVersion

_COMPACT = 4 << 20
"""Bytes after which the file is written anew."""


@dataclass
class OpenRecord:
    """A nodeid with `count` opens; `backing` is its passthrough backing id, 0 for none."""

    version: ObjectVersion
    source: str
    backing: int
    count: int


class Journal:
    """The journal at `path`. With `fresh`, what is there belongs to an earlier mount and is dropped."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._records: dict[int, OpenRecord] = {} if fresh else _read(path)
        self.inherited: dict[int, OpenRecord] = {
            nodeid: OpenRecord(**vars(record)) for nodeid, record in self._records.items()
        }
        self._fd = -1
        self._written = 0
        self._rewrite()

    def _rewrite(self) -> None:
        temporary = self._path.with_suffix(".new")
        lines = [
            _opened(nodeid, record.version, record.source, record.backing)
            for nodeid, record in self._records.items()
            for _ in range(record.count)
        ]
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        data = b"".join(lines)
        os.write(fd, data)
        os.rename(temporary, self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._written = fd, len(data)

    def _append(self, line: bytes) -> None:
        with contextlib.suppress(
            OSError
        ):  # a full tmpfs costs the restart its memory, not the reader its file
            os.write(self._fd, line)
            self._written += len(line)
            if self._written > _COMPACT and self._written > 256 * (len(self._records) + 1):
                self._rewrite()

    def opened(self, nodeid: int, version: ObjectVersion, source: str, backing: int) -> None:
        """One more open of this nodeid."""
        with self._lock:
            record = self._records.setdefault(nodeid, OpenRecord(version, source, backing, 0))
            record.count += 1
            self._append(_opened(nodeid, version, source, backing))

    def released(self, nodeid: int) -> None:
        """One open less."""
        with self._lock:
            record = self._records.get(nodeid)
            if record is None:
                return
            record.count -= 1
            if record.count <= 0:
                del self._records[nodeid]
            self._append(json.dumps({"r": nodeid}).encode() + b"\n")

    def close(self, *, remove: bool) -> None:
        """Close it; with `remove` there is nothing to come back to."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1
            if remove:
                with contextlib.suppress(OSError):
                    self._path.unlink()


def _opened(nodeid: int, version: ObjectVersion, source: str, backing: int) -> bytes:
    fields = {key: value for key, value in asdict(version).items() if key != "id"}
    return json.dumps({"o": nodeid, "v": fields, "s": source, "b": backing}).encode() + b"\n"


def _read(path: Path) -> dict[int, OpenRecord]:
    records: dict[int, OpenRecord] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return records
    for line in lines:
        try:
            found = json.loads(line)
            if "r" in found:
                record = records[int(found["r"])]
                record.count -= 1
                if record.count <= 0:
                    del records[int(found["r"])]
            else:
                version = ObjectVersion(**found["v"])
                fresh = OpenRecord(version, str(found["s"]), int(found["b"]), 0)
                records.setdefault(int(found["o"]), fresh).count += 1
        except (ValueError, KeyError, TypeError):
            continue
    return records
