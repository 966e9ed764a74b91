"""The keeper: a tiny process that holds the FUSE device of one mount and keeps a daemon on it.

The connection lives as long as a descriptor of it is open. The keeper has them all and does nothing else that could
fail, so a daemon may crash or be upgraded under a reader: the next daemon gets the same descriptors and the INIT
request of the first, and the kernel sends it again what was left unanswered.

The mount is *established* once a daemon is ready and has answered INIT. Before that the end of the daemon is the
failure of the mount command, because the kernel sends INIT only once; after that it is a restart, as RestartPolicy
allows it. When the keeper ends, whatever the cause, the mount is gone and no process waits for it.

One thread, one poll(2). Imports the standard library only, and modules that do so, too: the keeper has to stay small,
and whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusecache_mount.lifecycle import fuse_mount
from fusecache_mount.lifecycle.daemon_process import DaemonProcess
from fusecache_mount.lifecycle.keeper_files import CONNECTION_OPTION, KeeperLog, PidFile
from fusecache_mount.lifecycle.keeper_protocol import EXIT_UPGRADE, KeeperSettings, StartMessage
from fusecache_mount.lifecycle.restart_policy import MAX_RESTARTS, RESTART_WINDOW, RestartPolicy


class Keeper:
    """Holds the device descriptors of a mount and restarts its daemon. It tells the pipe `report_fd`, if there is one,
    how the start went: {"ready": true} or {"error": "one line"}.

    | state       | while                                    | left by                                            |
    |-------------|------------------------------------------|----------------------------------------------------|
    | starting    | no daemon has answered INIT and is ready | a daemon does -> established                       |
    |             |                                          | the daemon ends, ready_deadline -> failed          |
    | established | a daemon serves, or is restarted         | SIGTERM, SIGINT -> stopping                        |
    |             |                                          | the daemon ends with 0: somebody unmounted -> done |
    |             |                                          | one crash too many -> failed                       |
    | stopping    | unmounted, files may be open             | the daemon ends, or is killed at stop_deadline ->  |
    |             |                                          | done                                               |
    | done, failed| `_exit_status` is 0, 1                   |                                                    |
    """

    def __init__(
        self,
        settings: KeeperSettings,
        *,
        device_fd: int,
        clone_fds: Sequence[int],
        config_fd: int,
        report_fd: int | None,
    ) -> None:
        self._settings = settings
        self._device_fds = (device_fd, *clone_fds)
        self._report_fd = report_fd
        self._log = KeeperLog(settings.mountpoint, log_file=settings.log_file, log_format=settings.log_format)
        self._pid_file = PidFile(Path(settings.mount_runtime_dir))
        self._restart_policy = RestartPolicy(settings.backoff)
        self._daemon = DaemonProcess(
            settings.daemon_command,
            device_fd=device_fd,
            clone_fds=clone_fds,
            config_fd=config_fd,
            log=self._log,
        )
        self._is_established = False
        self._is_stopping = False
        self._failure_reason = ""
        """Why the keeper itself ended the present daemon."""
        self._kill_at: float | None = None
        self._restart_at: float | None = None
        self._exit_status: int | None = None
        self._wakeup_read_fd, self._wakeup_write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> int:
        """Keep the mount until its end; returns the exit status."""
        signal.set_wakeup_fd(self._wakeup_write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        try:
            self._pid_file.lock()
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
        if self._daemon.socket_fd is not None:
            poll.register(self._daemon.socket_fd, select.POLLIN)
        deadlines = [at for at in (self._kill_at, self._restart_at) if at is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = [fd for fd, _ in poll.poll(None if timeout is None else int(timeout * 1000) + 1)]
        if self._daemon.socket_fd in ready:
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
            if self._is_established and self._daemon.pid:
                self._log.write("info", "upgrading the daemon")
                self._daemon.request_upgrade()
        elif signal_number != signal.SIGHUP or self._settings.foreground:
            self._stop_mount(signal.Signals(signal_number).name)

    # -- the daemon

    def _start_daemon(self) -> None:
        self._failure_reason = ""
        self._daemon.start(
            StartMessage(
                restarts=self._restart_policy.crash_count,
                answered_init=self._daemon.answered_init,
                mount_id=self._settings.mount_id,
                runtime_dir=self._settings.runtime_dir,
                is_privileged=self._settings.is_privileged,
                unprivileged_reason=self._settings.unprivileged_reason,
            )
        )
        self._kill_at = time.monotonic() + self._settings.ready_deadline

    def _receive_messages(self) -> None:
        self._daemon.receive_messages()
        if self._daemon.is_ready and self._daemon.answered_init is not None and not self._is_stopping:
            if self._kill_at is not None:
                self._kill_at = None
                self._log.write(
                    "info",
                    "the daemon serves the mount",
                    pid=self._daemon.pid,
                    restarts=self._restart_policy.crash_count,
                )
            if not self._is_established:
                self._is_established = True
                self._report_to_launcher(ready=True)

    def _reap_children(self) -> None:
        """The first process of a container gets the orphans of other processes, too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._daemon.pid:
                self._receive_messages()
                self._daemon.forget_ended()
                self._handle_daemon_exit(os.waitstatus_to_exitcode(status))

    def _handle_daemon_exit(self, exit_code: int) -> None:
        self._kill_at = None
        if self._is_stopping or (exit_code == 0 and self._is_established):
            self._log.write("info", "the daemon ended")
            self._exit_status = 0
            return
        how = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"status {exit_code}"
        reason = self._failure_reason or self._daemon.error
        if not self._is_established:
            self._fail_mount(reason or f"the daemon ended with {how} before it was ready: see its log")
            return
        if exit_code == EXIT_UPGRADE and self._daemon.is_ready:
            self._start_daemon()
            return
        now = time.monotonic()
        pause = self._restart_policy.record_crash(now)
        if pause is None:
            self._fail_mount(
                f"the daemon ended {MAX_RESTARTS + 1} times within {RESTART_WINDOW:g} s: giving up"
            )
            return
        self._log.write("error", f"the daemon ended with {how}: starting it again", pause=pause, said=reason)
        self._restart_at = now + pause

    def _kill_after_deadline(self) -> None:
        """Kill the daemon after its deadline: that of the start, or that for open files to be closed."""
        if self._is_stopping:
            self._log.write("warning", "files are still open, or the daemon is stuck: reads fail from now on")
        else:
            self._failure_reason = f"the daemon was not ready within {self._settings.ready_deadline:g} s"
            self._log.write("error", f"{self._failure_reason}: killing it")
        self._daemon.kill()

    # -- the end

    def _stop_mount(self, signal_name: str) -> None:
        """Unmount. The daemon ends when the kernel tells it to, which is when the last open file is closed."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._restart_at = None
        self._log.write("info", f"unmounting on {signal_name}")
        if not self._is_established:
            self._failure_reason = f"stopped by {signal_name} before the mount was ready"
            self._report_to_launcher(error=self._failure_reason)
        self._unmount()
        if not self._daemon.pid:
            self._exit_status = 0
        elif self._is_established and self._daemon.is_ready:
            self._kill_at = time.monotonic() + self._settings.stop_deadline
        else:
            self._daemon.kill()

    def _unmount(self) -> None:
        mountpoint = Path(self._settings.mountpoint)
        for lazy in (False, True):
            try:
                if fuse_mount.is_mounted(mountpoint, self._settings.connection):
                    fuse_mount.unmount(mountpoint, lazy=lazy)
                return
            except OSError as error:
                reason = error.strerror
        self._log.write("warning", f"can't unmount {mountpoint}: {reason}")

    def _fail_mount(self, reason: str) -> None:
        self._log.write("error", reason)
        if self._settings.foreground and not self._is_established and not self._is_stopping:
            print(f"fusecache: {reason}", file=sys.stderr, flush=True)
        self._report_to_launcher(error=reason)
        self._exit_status = 1

    def _tear_down_mount(self) -> None:
        """Leave no process that waits for this mount: unmount first, so that no new user comes, then close the last
        descriptors, at which the kernel aborts the connection. (An abort by the connection's number could hit another
        mount, which has the number by now.)"""
        self._unmount()
        self._daemon.kill()
        self._daemon.wait_for_exit()
        for fd in self._device_fds:
            os.close(fd)
        self._pid_file.remove()
        reason = self._failure_reason or self._daemon.error
        self._report_to_launcher(error=reason or "the mount ended before it was ready")

    def _report_to_launcher(self, **message: Any) -> None:
        """Tell the launcher, which wants to hear one line, the first one."""
        if self._report_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._report_fd, json.dumps(message).encode() + b"\n")
            os.close(self._report_fd)
            self._report_fd = None


def main(arguments: list[str] | None = None) -> int:
    """Run the keeper; returns its exit status. All arguments are numbers of inherited descriptors."""
    parser = argparse.ArgumentParser(prog="fusecache-keeper")
    for name in ("settings", "device", "config"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--clones", default="")
    parser.add_argument("--report", type=int)
    parser.add_argument(CONNECTION_OPTION, help="not used: the process list shows by it which mount is kept")
    given = parser.parse_args(arguments)
    with os.fdopen(given.settings, "rb") as file:
        file.seek(0)
        settings = KeeperSettings.from_json(file.read())
    clone_fds = [int(fd) for fd in given.clones.split(",") if fd]
    for fd in (given.device, given.config, given.report, *clone_fds):
        if fd is not None:
            os.set_inheritable(fd, False)
    os.chdir("/")
    keeper = Keeper(
        settings,
        device_fd=given.device,
        clone_fds=clone_fds,
        config_fd=given.config,
        report_fd=given.report,
    )
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())
