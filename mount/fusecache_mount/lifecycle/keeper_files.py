"""The traces of a keeper that other processes find: its pid file, its lines in the log, its command line.
Standard library only."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from fusecache_mount.lifecycle.keeper_protocol import KEEPER_MODULE

PID_NAME = "keeper.pid"
CONNECTION_OPTION = "--connection"


class PidFile:
    """The pid file of this process in a mount's runtime directory: locked as long as the process lives, so that a
    reader knows whether the number is still true. Unlocked (after construction), then locked by `lock`, then
    removed."""

    def __init__(self, mount_runtime_dir: Path) -> None:
        self._path = mount_runtime_dir / PID_NAME
        self._fd = -1

    def lock(self) -> None:
        """Write the pid. Raises OSError, BlockingIOError among them when another keeper lives."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def remove(self) -> None:
        """Unlink the file, if `lock` opened it; the lock itself goes with the process."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


class KeeperLog:
    """Writes log lines in the formats of fusecache.telemetry.logs, which the keeper can't afford to import. Without
    `log_file` the lines go to stderr. A file is opened for each line: it may have been rotated."""

    def __init__(self, mountpoint: str, *, log_file: str | None, log_format: str) -> None:
        self._mountpoint = mountpoint
        self._log_file = log_file
        self._log_format = log_format

    def write(self, level: str, event: str, **fields: Any) -> None:
        """Write one line. A log that can't be written raises nothing: the mount is worth more."""
        with contextlib.suppress(OSError):
            line = self._format_line(level, event, {"mountpoint": self._mountpoint, **fields})
            if self._log_file is None:
                os.write(2, line)
                return
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            fd = os.open(self._log_file, flags, 0o600)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)

    def _format_line(self, level: str, event: str, fields: dict[str, Any]) -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        if self._log_format == "json":
            head = {"timestamp": now, "level": level, "logger": "fusecache.keeper", "event": event}
            line = json.dumps({**head, **fields})
        else:
            extra = "".join(f" {key}={json.dumps(value)}" for key, value in fields.items())
            line = f"{now} {level:<7} fusecache.keeper: {event}{extra}"
        return line.encode("utf-8", "backslashreplace") + b"\n"


def find_keeper_by_directory(mount_runtime_dir: Path) -> int | None:
    """The pid of the living keeper whose runtime directory this is; None when no keeper has it."""
    with contextlib.suppress(OSError, ValueError), open(mount_runtime_dir / PID_NAME, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0) or None
    return None


def find_keeper_by_connection(connection: int) -> int | None:
    """The pid of the keeper of a connection, found in the process list, so that its runtime directory need not be
    known. The kernel gives a connection's number to the next mount while the keeper of the one before may still be
    ending: of several keepers this returns the youngest."""
    found: tuple[int, int] | None = None
    for name in os.listdir("/proc"):
        if name.isdecimal() and _connection_in_command_line(name) == str(connection).encode():
            began = _process_start_ticks(name)
            if began is not None:
                found = max(found or (0, 0), (began, int(name)))
    return None if found is None else found[1]


def _connection_in_command_line(pid: str) -> bytes | None:
    try:
        words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    option = CONNECTION_OPTION.encode()
    if KEEPER_MODULE.encode() not in words or option not in words:
        return None
    return words[words.index(option) + 1]


def _process_start_ticks(pid: str) -> int | None:
    """The time at which a process started, in clock ticks since the boot; None when it has ended."""
    try:
        fields = Path("/proc", pid, "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])
