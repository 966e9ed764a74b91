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

from fusecache.mount import mounting

EXIT_UPGRADE = 75
MOST_RESTARTS = 5
RESTART_WINDOW = 60.0
PID_NAME = "keeper.pid"
DAEMON = (sys.executable, "-P", "-m", "fusecache.mount.daemon")
_BACKOFF = (0.05, 0.2, 0.5, 1.0, 2.0)
_BURIAL = 5
"""Seconds in which a killed process ends, unless its disk hangs."""
_MESSAGE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What the mount command tells, as JSON. Deadlines in seconds: `ready_deadline` for the start of a daemon, with
    its first listing; `stop_deadline` for open files to be closed after SIGTERM."""

    mountpoint: str
    connection: int
    mount_id: str
    runtime_dir: str
    directory: str
    """The runtime directory of this mount: the pid file lies there."""
    privileged: bool
    why: str
    log_file: str | None = None
    log_format: str = "text"
    foreground: bool = False
    ready_deadline: float = 600.0
    stop_deadline: float = 8.0
    backoff: float = 1.0
    """Factor of the pauses before restarts."""
    daemon: list[str] = field(default_factory=lambda: list(DAEMON))


class Keeper:
    """Holds `device`, its `clones` and the memfd `config`; reports to the pipe `report`, if there is one, what
    became of the start: {"ready": true} or {"error": "one line"}."""

    def __init__(
        self, settings: Settings, device: int, clones: list[int], config: int, report: int | None
    ) -> None:
        self._settings = settings
        self._device = device
        self._clones = clones
        self._config = config
        self._report = report
        self._pid = 0
        self._channel: socket.socket | None = None
        self._init: str | None = None
        self._ready = False
        self._established = False
        self._reason = ""
        """What the daemon said before it failed."""
        self._restarts = 0
        self._crashes: deque[float] = deque(maxlen=MOST_RESTARTS)
        self._stopping = False
        self._kill_at: float | None = None
        self._start_at: float | None = None
        self._exit: int | None = None
        self._wakeup, self._wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pid_file = -1

    # -- life

    def run(self) -> int:
        """Keep the mount until its end; returns the exit status."""
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        try:
            self._take_pid_file()
            self._start()
            while self._exit is None:
                self._wait()
        except Exception as error:
            self._fail(f"the keeper failed: {type(error).__name__}: {error}")
        finally:
            self._end()
        return self._exit or 0

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if self._channel is not None:
            poll.register(self._channel, select.POLLIN)
        deadlines = [at for at in (self._kill_at, self._start_at) if at is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = [fd for fd, _ in poll.poll(None if timeout is None else int(timeout * 1000) + 1)]
        if self._channel is not None and self._channel.fileno() in ready:
            self._receive()
        if self._wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                for number in set(os.read(self._wakeup, 4096)):
                    self._signalled(number)
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._too_late()
        if self._start_at is not None and now >= self._start_at:
            self._start_at = None
            self._start()

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        elif number == signal.SIGUSR1:
            if self._established and self._pid:
                self._log("info", "upgrading the daemon")
                os.kill(self._pid, signal.SIGUSR1)
        elif number != signal.SIGHUP or self._settings.foreground:
            self._stop(signal.Signals(number).name)

    # -- the daemon

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.lseek(self._config, 0, os.SEEK_SET)
        inherited = [self._device, *self._clones, self._config, theirs.fileno()]
        command = [
            *self._settings.daemon,
            *("--device", str(self._device), "--clones", ",".join(map(str, self._clones))),
            *("--keeper", str(theirs.fileno()), "--config", str(self._config)),
        ]
        keeper = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            self._become(command, inherited, keeper)
        theirs.close()
        ours.setblocking(False)
        self._channel, self._ready, self._reason = ours, False, ""
        self._kill_at = time.monotonic() + self._settings.ready_deadline
        first = {
            "restarts": self._restarts,
            "init": self._init,
            "mount_id": self._settings.mount_id,
            "runtime_dir": self._settings.runtime_dir,
            "privileged": self._settings.privileged,
            "why": self._settings.why,
        }
        with contextlib.suppress(OSError):
            ours.send(json.dumps(first).encode())

    def _become(self, command: list[str], inherited: list[int], keeper: int) -> None:
        """In the child: never returns."""
        try:
            signal.set_wakeup_fd(-1)
            mounting.die_with_parent(signal.SIGKILL)
            if os.getppid() != keeper:
                os._exit(1)
            for fd in inherited:
                os.set_inheritable(fd, True)
            os.execv(command[0], command)  # noqa: S606  descriptors and the parent stay as they are
        except BaseException:
            os._exit(127)

    def _receive(self) -> None:
        assert self._channel is not None
        while self._channel is not None:
            try:
                data = self._channel.recv(_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._channel.close()
                self._channel = None
                return
            try:
                self._told(json.loads(data))
            except (ValueError, AttributeError, TypeError):
                self._log("warning", "the daemon said something that is no message")

    def _told(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self._reason = " ".join(str(message["error"]).split())
        if self._init is None and "init" in message:
            self._init = str(message["init"])
        if message.get("ready") is True:
            self._ready = True
        if self._ready and self._init is not None and not self._stopping:
            if self._kill_at is not None:
                self._kill_at = None
                self._log("info", "the daemon serves the mount", pid=self._pid, restarts=self._restarts)
            if not self._established:
                self._established = True
                self._tell_starter(ready=True)

    def _reap(self) -> None:
        """As the first process of a container we get the orphans of others, too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._receive_rest()
                self._pid = 0
                self._ended(os.waitstatus_to_exitcode(status))

    def _receive_rest(self) -> None:
        if self._channel is not None:
            self._receive()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _ended(self, code: int) -> None:
        self._kill_at = None
        if self._stopping or (code == 0 and self._established):
            self._log("info", "the daemon ended")
            self._exit = 0
            return
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        if not self._established:
            self._fail(self._reason or f"the daemon ended with {what} before it was ready: see its log")
            return
        if code == EXIT_UPGRADE and self._ready:
            self._start()
            return
        self._restarts += 1
        now = time.monotonic()
        if len(self._crashes) == MOST_RESTARTS and now - self._crashes[0] < RESTART_WINDOW:
            self._fail(f"the daemon ended {MOST_RESTARTS + 1} times within {RESTART_WINDOW:g} s: giving up")
            return
        recent = sum(now - then < RESTART_WINDOW for then in self._crashes)
        self._crashes.append(now)
        pause = _BACKOFF[min(recent, len(_BACKOFF) - 1)] * self._settings.backoff
        self._log("error", f"the daemon ended with {what}: starting it again", pause=pause, said=self._reason)
        self._start_at = now + pause

    def _too_late(self) -> None:
        """A deadline has passed: of the start, or for open files to be closed."""
        if self._stopping:
            self._log("warning", "files are still open, or the daemon is stuck: reads fail from now on")
        else:
            self._reason = f"the daemon was not ready within {self._settings.ready_deadline:g} s"
            self._log("error", f"{self._reason}: killing it")
        self._kill()

    def _kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    # -- the end

    def _stop(self, name: str) -> None:
        """Unmount; the daemon ends when the kernel tells it so, which is when the last open file is closed."""
        if self._stopping:
            return
        self._stopping = True
        self._start_at = None
        self._log("info", f"unmounting on {name}")
        if not self._established:
            self._reason = f"stopped by {name} before the mount was ready"
            self._tell_starter(error=self._reason)
        self._unmount()
        if not self._pid:
            self._exit = 0
        elif self._established and self._ready:
            self._kill_at = time.monotonic() + self._settings.stop_deadline
        else:
            self._kill()

    def _unmount(self) -> None:
        mountpoint = Path(self._settings.mountpoint)
        for lazy in (False, True):
            try:
                if mounting.is_mounted(mountpoint, self._settings.connection):
                    mounting.unmount(mountpoint, lazy=lazy)
                return
            except OSError as error:
                reason = error.strerror
        self._log("warning", f"can't unmount {mountpoint}: {reason}")

    def _fail(self, reason: str) -> None:
        self._log("error", reason)
        if self._settings.foreground and not self._established and not self._stopping:
            print(f"fusecache: {reason}", file=sys.stderr, flush=True)
        self._tell_starter(error=reason)
        self._exit = 1

    def _end(self) -> None:
        """Nobody may wait for this mount any more: unmounted first, so that no new user comes, then aborted, which
        the kernel does when the last descriptor is closed. (Not by its number: it may be another mount's by now.)"""
        self._unmount()
        self._kill()
        self._bury()
        for fd in (self._device, *self._clones):
            os.close(fd)
        if self._pid_file >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._pid_path)
        self._tell_starter(error=self._reason or "the mount ended before it was ready")

    def _bury(self) -> None:
        """Wait for a killed daemon, so that after us nothing of the mount is left."""
        if not self._pid:
            return
        with contextlib.suppress(OSError):
            ended = os.pidfd_open(self._pid)
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            poll.poll(_BURIAL * 1000)
            os.close(ended)

    # -- what others see

    @property
    def _pid_path(self) -> str:
        return os.path.join(self._settings.directory, PID_NAME)

    def _take_pid_file(self) -> None:
        """Locked as long as this process lives, so that its reader knows whether the number is still true."""
        self._pid_file = os.open(self._pid_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._pid_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._pid_file, 0)
        os.pwrite(self._pid_file, f"{os.getpid()}\n".encode(), 0)

    def _tell_starter(self, **message: Any) -> None:
        if self._report is not None:
            with contextlib.suppress(OSError):
                os.write(self._report, json.dumps(message).encode() + b"\n")
            os.close(self._report)
            self._report = None

    def _log(self, level: str, event: str, **fields: Any) -> None:
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


def keeper_of(directory: Path) -> int | None:
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


def find_keeper(connection: int) -> int | None:
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
        if b"fusecache.mount.keeper" in words and b"--connection" in words:
            number = words[words.index(b"--connection") + 1]
            began = _began(name) if number == str(connection).encode() else None
            if began is not None:
                found = max(found or (0, 0), (began, int(name)))
    return None if found is None else found[1]


def _began(pid: str) -> int | None:
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
        settings = Settings(**json.load(file))
    clones = [int(fd) for fd in given.clones.split(",") if fd]
    for fd in (given.device, given.config, given.report, *clones):
        if fd is not None:
            os.set_inheritable(fd, False)
    os.chdir("/")
    return Keeper(settings, given.device, clones, given.config, given.report).run()


if __name__ == "__main__":
    sys.exit(main())
