"""The keeper: a tiny process that holds the FUSE device of one mount and keeps a daemon on it.

The connection lives as long as a descriptor of it is open. The keeper has them all and does nothing else that could
fail, so a daemon may crash or be upgraded under a reader: the next one gets the same descriptors and the INIT
exchange of the first, and the kernel sends it again what was left unanswered.

    daemon -> keeper   {"ready": true} | {"error": "one line"} | {"init": base64, "reply": base64}
    keeper -> daemon   first and once: {"restarts", "init", "mount_id", "runtime_dir", "privileged", "why"}

The mount is *established* once a daemon is ready and has answered INIT. Before that the end of the daemon is the
failure of the mount command, because the kernel sends INIT only once; after that it is a restart, at most
MOST_RESTARTS in RESTART_WINDOW seconds. In the end, whatever its cause, the mount is gone and nobody waits for it.

One thread, one poll(2). Imports the standard library only: it has to stay small, and whole.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecache_mount.kernel import syscalls
from fusecache_mount.lifecycle import mounting

EXIT_UPGRADE = 75
MAX_RESTARTS = 5
RESTART_WINDOW = 60.0
PID_NAME = "keeper.pid"
DAEMON_COMMAND = (sys.executable, "-P", "-m", "fusecache_mount.lifecycle.daemon")
_RESTART_PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0)
_DAEMON_EXIT_TIMEOUT = 5
"""Seconds in which a killed process ends, unless its disk hangs."""
_MAX_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True)
class KeeperSettings:
    """What the mount command tells, as JSON. Deadlines in seconds: `ready_deadline` for the start of a daemon, with
    its first listing; `stop_deadline` for open files to be closed after SIGTERM."""

    mountpoint: str
    connection: int
    mount_id: str
    runtime_dir: str
    mount_runtime_dir: str
    """The runtime directory of this mount: the pid file lies there."""
    is_privileged: bool
    unprivileged_reason: str
    log_file: str | None = None
    log_format: str = "text"
    foreground: bool = False
    ready_deadline: float = 600.0
    stop_deadline: float = 8.0
    backoff: float = 1.0
    """Factor of the pauses before restarts."""
    daemon_command: list[str] = field(default_factory=lambda: list(DAEMON_COMMAND))


class Keeper:
    """Holds `device`, its `clones` and the memfd `config`; reports to the pipe `report`, if there is one, what
    became of the start: {"ready": true} or {"error": "one line"}."""

    def __init__(
        self,
        settings: KeeperSettings,
        device_fd: int,
        clone_fds: list[int],
        config_fd: int,
        report_fd: int | None,
    ) -> None:
        self._settings = settings
        self._device_fd = device_fd
        self._clone_fds = clone_fds
        self._config_fd = config_fd
        self._report_fd = report_fd
        self._daemon_pid = 0
        self._daemon_socket: socket.socket | None = None
        self._init_request: str | None = None
        self._is_ready = False
        self._is_established = False
        self._failure_reason = ""
        """What the daemon said before it failed."""
        self._restart_count = 0
        self._crash_times: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._is_stopping = False
        self._kill_at: float | None = None
        self._restart_at: float | None = None
        self._exit_status: int | None = None
        self._wakeup_read_fd, self._wakeup_write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pid_file_fd = -1

    # -- life

    def run(self) -> int:
        """Keep the mount until its end; returns the exit status."""
        signal.set_wakeup_fd(self._wakeup_write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        try:
            self._lock_pid_file()
            self._start_daemon()
            while self._exit_status is None:
                self._handle_next_events()
        except Exception as error:
            self._fail_mount(f"the keeper failed: {type(error).__name__}: {error}")
        finally:
            self._tear_down_mount()
        return self._exit_status or 0

    def _handle_next_events(self) -> None:
        poll = select.poll()
        poll.register(self._wakeup_read_fd, select.POLLIN)
        if self._daemon_socket is not None:
            poll.register(self._daemon_socket, select.POLLIN)
        deadlines = [at for at in (self._kill_at, self._restart_at) if at is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = [fd for fd, _ in poll.poll(None if timeout is None else int(timeout * 1000) + 1)]
        if self._daemon_socket is not None and self._daemon_socket.fileno() in ready:
            self._receive_messages()
        if self._wakeup_read_fd in ready:
            with contextlib.suppress(BlockingIOError):
                for number in set(os.read(self._wakeup_read_fd, 4096)):
                    self._handle_signal(number)
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._kill_after_deadline()
        if self._restart_at is not None and now >= self._restart_at:
            self._restart_at = None
            self._start_daemon()

    def _handle_signal(self, signal_number: int) -> None:
        if signal_number == signal.SIGCHLD:
            self._reap_children()
        elif signal_number == signal.SIGUSR1:
            if self._is_established and self._daemon_pid:
                self._log_event("info", "upgrading the daemon")
                os.kill(self._daemon_pid, signal.SIGUSR1)
        elif signal_number != signal.SIGHUP or self._settings.foreground:
            self._stop_mount(signal.Signals(signal_number).name)

    # -- the daemon

    def _start_daemon(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.lseek(self._config_fd, 0, os.SEEK_SET)
        keeper_link = [self._device_fd, *self._clone_fds, self._config_fd, theirs.fileno()]
        command = [
            *self._settings.daemon_command,
            *("--device", str(self._device_fd), "--clones", ",".join(map(str, self._clone_fds))),
            *("--keeper", str(theirs.fileno()), "--config", str(self._config_fd)),
        ]
        keeper = os.getpid()
        self._daemon_pid = os.fork()
        if self._daemon_pid == 0:
            self._exec_daemon(command, keeper_link, keeper)
        theirs.close()
        ours.setblocking(False)
        self._daemon_socket, self._is_ready, self._failure_reason = ours, False, ""
        self._kill_at = time.monotonic() + self._settings.ready_deadline
        first = {
            "restarts": self._restart_count,
            "init": self._init_request,
            "mount_id": self._settings.mount_id,
            "runtime_dir": self._settings.runtime_dir,
            "privileged": self._settings.is_privileged,
            "why": self._settings.unprivileged_reason,
        }
        with contextlib.suppress(OSError):
            ours.send(json.dumps(first).encode())

    def _exec_daemon(self, command: list[str], inherited_fds: list[int], keeper_pid: int) -> None:
        """In the child: never returns."""
        try:
            signal.set_wakeup_fd(-1)
            syscalls.set_parent_death_signal(signal.SIGKILL)
            if os.getppid() != keeper_pid:
                os._exit(1)
            for fd in inherited_fds:
                os.set_inheritable(fd, True)
            os.execv(command[0], command)  # noqa: S606  descriptors and the parent stay as they are
        except BaseException:
            os._exit(127)

    def _receive_messages(self) -> None:
        assert self._daemon_socket is not None
        while self._daemon_socket is not None:
            try:
                data = self._daemon_socket.recv(_MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._daemon_socket.close()
                self._daemon_socket = None
                return
            try:
                self._handle_message(json.loads(data))
            except (ValueError, AttributeError, TypeError):
                self._log_event("warning", "the daemon said something that is no message")

    def _handle_message(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self._failure_reason = " ".join(str(message["error"]).split())
        if self._init_request is None and "init" in message:
            self._init_request = str(message["init"])
        if message.get("ready") is True:
            self._is_ready = True
        if self._is_ready and self._init_request is not None and not self._is_stopping:
            if self._kill_at is not None:
                self._kill_at = None
                self._log_event(
                    "info", "the daemon serves the mount", pid=self._daemon_pid, restarts=self._restart_count
                )
            if not self._is_established:
                self._is_established = True
                self._report_to_launcher(ready=True)

    def _reap_children(self) -> None:
        """As the first process of a container we get the orphans of others, too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._daemon_pid:
                self._receive_last_messages()
                self._daemon_pid = 0
                self._handle_daemon_exit(os.waitstatus_to_exitcode(status))

    def _receive_last_messages(self) -> None:
        if self._daemon_socket is not None:
            self._receive_messages()
        if self._daemon_socket is not None:
            self._daemon_socket.close()
            self._daemon_socket = None

    def _handle_daemon_exit(self, exit_code: int) -> None:
        self._kill_at = None
        if self._is_stopping or (exit_code == 0 and self._is_established):
            self._log_event("info", "the daemon ended")
            self._exit_status = 0
            return
        what = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"status {exit_code}"
        if not self._is_established:
            self._fail_mount(
                self._failure_reason or f"the daemon ended with {what} before it was ready: see its log"
            )
            return
        if exit_code == EXIT_UPGRADE and self._is_ready:
            self._start_daemon()
            return
        self._restart_count += 1
        now = time.monotonic()
        if len(self._crash_times) == MAX_RESTARTS and now - self._crash_times[0] < RESTART_WINDOW:
            self._fail_mount(
                f"the daemon ended {MAX_RESTARTS + 1} times within {RESTART_WINDOW:g} s: giving up"
            )
            return
        recent = sum(now - then < RESTART_WINDOW for then in self._crash_times)
        self._crash_times.append(now)
        pause = _RESTART_PAUSES[min(recent, len(_RESTART_PAUSES) - 1)] * self._settings.backoff
        self._log_event(
            "error",
            f"the daemon ended with {what}: starting it again",
            pause=pause,
            said=self._failure_reason,
        )
        self._restart_at = now + pause

    def _kill_after_deadline(self) -> None:
        """A deadline has passed: of the start, or for open files to be closed."""
        if self._is_stopping:
            self._log_event("warning", "files are still open, or the daemon is stuck: reads fail from now on")
        else:
            self._failure_reason = f"the daemon was not ready within {self._settings.ready_deadline:g} s"
            self._log_event("error", f"{self._failure_reason}: killing it")
        self._kill_daemon()

    def _kill_daemon(self) -> None:
        if self._daemon_pid:
            os.kill(self._daemon_pid, signal.SIGKILL)

    # -- the end

    def _stop_mount(self, signal_name: str) -> None:
        """Unmount; the daemon ends when the kernel tells it so, which is when the last open file is closed."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._restart_at = None
        self._log_event("info", f"unmounting on {signal_name}")
        if not self._is_established:
            self._failure_reason = f"stopped by {signal_name} before the mount was ready"
            self._report_to_launcher(error=self._failure_reason)
        self._unmount()
        if not self._daemon_pid:
            self._exit_status = 0
        elif self._is_established and self._is_ready:
            self._kill_at = time.monotonic() + self._settings.stop_deadline
        else:
            self._kill_daemon()

    def _unmount(self) -> None:
        mountpoint = Path(self._settings.mountpoint)
        for lazy in (False, True):
            try:
                if mounting.is_mounted(mountpoint, self._settings.connection):
                    mounting.unmount(mountpoint, lazy=lazy)
                return
            except OSError as error:
                reason = error.strerror
        self._log_event("warning", f"can't unmount {mountpoint}: {reason}")

    def _fail_mount(self, reason: str) -> None:
        self._log_event("error", reason)
        if self._settings.foreground and not self._is_established and not self._is_stopping:
            print(f"fusecache: {reason}", file=sys.stderr, flush=True)
        self._report_to_launcher(error=reason)
        self._exit_status = 1

    def _tear_down_mount(self) -> None:
        """Nobody may wait for this mount any more: unmounted first, so that no new user comes, then aborted, which
        the kernel does when the last descriptor is closed. (Not by its number: it may be another mount's by now.)"""
        self._unmount()
        self._kill_daemon()
        self._wait_for_exit()
        for fd in (self._device_fd, *self._clone_fds):
            os.close(fd)
        if self._pid_file_fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._pid_file_path)
        self._report_to_launcher(error=self._failure_reason or "the mount ended before it was ready")

    def _wait_for_exit(self) -> None:
        """Wait for a killed daemon, so that after us nothing of the mount is left."""
        if not self._daemon_pid:
            return
        with contextlib.suppress(OSError):
            ended = os.pidfd_open(self._daemon_pid)
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            poll.poll(_DAEMON_EXIT_TIMEOUT * 1000)
            os.close(ended)

    # -- what others see

    @property
    def _pid_file_path(self) -> str:
        return os.path.join(self._settings.mount_runtime_dir, PID_NAME)

    def _lock_pid_file(self) -> None:
        """Locked as long as this process lives, so that its reader knows whether the number is still true."""
        self._pid_file_fd = os.open(self._pid_file_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._pid_file_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._pid_file_fd, 0)
        os.pwrite(self._pid_file_fd, f"{os.getpid()}\n".encode(), 0)

    def _report_to_launcher(self, **message: Any) -> None:
        if self._report_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._report_fd, json.dumps(message).encode() + b"\n")
            os.close(self._report_fd)
            self._report_fd = None

    def _log_event(self, level: str, event: str, **fields: Any) -> None:
        """In the format of fusecache.telemetry.logs, which this process can't afford to import."""
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        fields = {"mountpoint": self._settings.mountpoint, **fields}
        if self._settings.log_format == "json":
            line = json.dumps(
                {"timestamp": now, "level": level, "logger": "fusecache.keeper", "event": event, **fields}
            )
        else:
            extra = "".join(f" {key}={json.dumps(value)}" for key, value in fields.items())
            line = f"{now} {level:<7} fusecache.keeper: {event}{extra}"
        with contextlib.suppress(OSError):
            fd = 2
            if self._settings.log_file is not None:
                fd = os.open(
                    self._settings.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
                )
            try:
                os.write(fd, line.encode("utf-8", "backslashreplace") + b"\n")
            finally:
                if fd != 2:
                    os.close(fd)


def find_keeper_by_directory(directory: Path) -> int | None:
    """The pid of the living keeper whose runtime directory this is."""
    try:
        with open(directory / PID_NAME, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
    except (OSError, ValueError):
        pass
    return None


def find_keeper_by_connection(connection: int) -> int | None:
    """The pid of the process that keeps a connection, from the process list: whatever its runtime directory is. The
    kernel gives a connection's number to the next mount while the keeper of the one before may still be ending: the
    youngest it is."""
    found: tuple[int, int] | None = None
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if b"fusecache_mount.lifecycle.keeper" in words and b"--connection" in words:
            number = words[words.index(b"--connection") + 1]
            began = _process_start_ticks(name) if number == str(connection).encode() else None
            if began is not None:
                found = max(found or (0, 0), (began, int(name)))
    return None if found is None else found[1]


def _process_start_ticks(pid: str) -> int | None:
    """When a process started, in clock ticks since the boot; None: it ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])


def main(arguments: list[str] | None = None) -> int:
    """Run the keeper. All arguments are numbers of inherited descriptors."""
    parser = argparse.ArgumentParser(prog="fusecache-keeper")
    for name in ("settings", "device", "config"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--clones", default="")
    parser.add_argument("--report", type=int)
    parser.add_argument("--connection", help="not used: shows in the process list whose keeper this is")
    given = parser.parse_args(arguments)
    with os.fdopen(given.settings, "rb") as file:
        file.seek(0)
        settings = KeeperSettings(**json.load(file))
    clones = [int(fd) for fd in given.clones.split(",") if fd]
    for fd in (given.device, given.config, given.report, *clones):
        if fd is not None:
            os.set_inheritable(fd, False)
    os.chdir("/")
    return Keeper(settings, given.device, clones, given.config, given.report).run()


if __name__ == "__main__":
    sys.exit(main())
