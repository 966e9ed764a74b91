"""Which files are open, kept where a restarted daemon finds it: one JSON line per change, in the runtime
directory (a tmpfs). No fsync: it has to outlive the daemon, not the machine, and neither do the mounts.

A line is {"o": nodeid, "v": version, "s": source, "b": backing id} for an open and {"r": nodeid} for a release.
Torn or foreign lines are skipped. Thread-safe.

An open is recorded before it is answered, a release some time after it. So a nodeid that is closed and opened again
may be recorded as open twice, first with a backing that is gone: what the newest open says counts for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fusecache.locking import OwnedLock
from fusecache.types import ObjectVersion

_COMPACT_BYTES = 4 << 20
"""Bytes after which the file is written anew."""


@dataclass
class OpenRecord:
    """A nodeid with `open_count` opens; `backing_id` is its passthrough backing, 0 for none."""

    version: ObjectVersion
    source: str
    backing_id: int
    open_count: int


class OpenFileJournal:
    """The journal at `path`. With `discard_existing`, the records there belong to an earlier mount and are dropped;
    otherwise they are `inherited_opens`. `_lock` guards the records and the file. Methods write to a tmpfs under it."""

    def __init__(self, path: Path, *, discard_existing: bool) -> None:
        self._path = path
        self._lock = OwnedLock()
        self._records: dict[int, OpenRecord] = {} if discard_existing else _read_records(path)
        self.inherited_opens: dict[int, OpenRecord] = {
            nodeid: OpenRecord(**vars(record)) for nodeid, record in self._records.items()
        }
        self._fd = -1
        self._written_bytes = 0
        with self._lock:
            self._rewrite_file_locked()

    def _rewrite_file_locked(self) -> None:
        self._lock.assert_held()
        temporary = self._path.with_suffix(".new")
        lines = [
            _format_open(nodeid, record.version, record.source, record.backing_id)
            for nodeid, record in self._records.items()
            for _ in range(record.open_count)
        ]
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        data = b"".join(lines)
        os.write(fd, data)
        os.rename(temporary, self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._written_bytes = fd, len(data)

    def _append_line_locked(self, line: bytes) -> None:
        self._lock.assert_held()
        # a full tmpfs costs the restart its memory, not the reader its file
        with contextlib.suppress(OSError):
            os.write(self._fd, line)
            self._written_bytes += len(line)
            if self._written_bytes > _COMPACT_BYTES and self._written_bytes > 256 * (len(self._records) + 1):
                self._rewrite_file_locked()

    def record_open(self, nodeid: int, version: ObjectVersion, source: str, backing_id: int) -> None:
        """One more open of this nodeid."""
        with self._lock:
            _count_open(self._records, nodeid, version, source, backing_id)
            self._append_line_locked(_format_open(nodeid, version, source, backing_id))

    def record_release(self, nodeid: int) -> None:
        """One open less."""
        with self._lock:
            record = self._records.get(nodeid)
            if record is None:
                return
            record.open_count -= 1
            if record.open_count <= 0:
                del self._records[nodeid]
            self._append_line_locked(json.dumps({"r": nodeid}).encode() + b"\n")

    def close(self, *, remove: bool) -> None:
        """Close it; with `remove` delete it: no daemon comes after this one."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1
            if remove:
                with contextlib.suppress(OSError):
                    self._path.unlink()


def _count_open(
    records: dict[int, OpenRecord], nodeid: int, version: ObjectVersion, source: str, backing_id: int
) -> None:
    """One more open of this nodeid, as the version and with the backing that this open has."""
    earlier = records.get(nodeid)
    opens = 0 if earlier is None else earlier.open_count
    records[nodeid] = OpenRecord(version, source, backing_id, opens + 1)


def _format_open(nodeid: int, version: ObjectVersion, source: str, backing_id: int) -> bytes:
    fields = {key: value for key, value in asdict(version).items() if key != "id"}
    return json.dumps({"o": nodeid, "v": fields, "s": source, "b": backing_id}).encode() + b"\n"


def _read_records(path: Path) -> dict[int, OpenRecord]:
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
                record.open_count -= 1
                if record.open_count <= 0:
                    del records[int(found["r"])]
            else:
                version = ObjectVersion(**found["v"])
                _count_open(records, int(found["o"]), version, str(found["s"]), int(found["b"]))
        except (ValueError, KeyError, TypeError):
            continue
    return records
