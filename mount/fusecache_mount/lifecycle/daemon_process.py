"""The keeper's side of the daemon: starts it, hears what it says, ends it. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence

from fusecache_mount.kernel import syscalls
from fusecache_mount.lifecycle.keeper_files import KeeperLog
from fusecache_mount.lifecycle.keeper_protocol import MAX_MESSAGE_BYTES, DaemonMessage, StartMessage

_EXIT_TIMEOUT = 5
"""Seconds in which a killed process ends, unless its disk hangs."""


class DaemonProcess:
    """The daemon of a mount, at most one process at a time. All of it happens in the keeper's one thread.

    | state   | means                             | left by                                             |
    |---------|-----------------------------------|-----------------------------------------------------|
    | absent  | `pid` is 0                        | `start` -> running                                  |
    | running | the process lives, or is a zombie | its {"ready"} -> ready; `forget_ended` -> absent    |
    | ready   | `is_ready`: it serves the mount   | `forget_ended` -> absent                            |

    `answered_init` outlives the process: the kernel sends INIT once per connection.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        device_fd: int,
        clone_fds: Sequence[int],
        config_fd: int,
        log: KeeperLog,
    ) -> None:
        self._command = command
        self._device_fd = device_fd
        self._clone_fds = clone_fds
        self._config_fd = config_fd
        self._log = log
        self._socket: socket.socket | None = None
        self.pid = 0
        self.is_ready = False
        self.error = ""
        """The reason that the present process, or the last one, gave for its end."""
        self.answered_init: bytes | None = None

    @property
    def socket_fd(self) -> int | None:
        """The descriptor that is readable when the daemon said something, or went away."""
        return None if self._socket is None else self._socket.fileno()

    def start(self, message: StartMessage) -> None:
        """Start a process on the device, and tell it `message`. Raises OSError when there is no process to be had."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.lseek(self._config_fd, 0, os.SEEK_SET)
        inherited_fds = [self._device_fd, *self._clone_fds, self._config_fd, theirs.fileno()]
        command = [
            *self._command,
            *("--device", str(self._device_fd), "--clones", ",".join(map(str, self._clone_fds))),
            *("--keeper", str(theirs.fileno()), "--config", str(self._config_fd)),
        ]
        keeper_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _exec_daemon(command, inherited_fds, keeper_pid)
        theirs.close()
        ours.setblocking(False)
        self._socket, self.is_ready, self.error = ours, False, ""
        with contextlib.suppress(OSError):
            ours.send(message.to_json())

    def receive_messages(self) -> None:
        """Take note of all that the daemon has said by now. Does not block."""
        while self._socket is not None:
            try:
                data = self._socket.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._close_socket()
                return
            try:
                self._note_message(DaemonMessage.from_json(data))
            except ValueError:
                self._log.write("warning", "the daemon said something that is no message")

    def forget_ended(self) -> None:
        """Note that the process was reaped; its last words were received before."""
        self._close_socket()
        self.pid = 0

    def request_upgrade(self) -> None:
        """Have a daemon that runs make way for one of the version that is installed now."""
        if self.pid:
            os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """End a daemon that runs, at once."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def wait_for_exit(self) -> None:
        """Block until a killed daemon has ended, but not for longer than _EXIT_TIMEOUT."""
        if self.pid:
            with contextlib.suppress(OSError):
                syscalls.wait_for_exit(self.pid, _EXIT_TIMEOUT)

    def _note_message(self, message: DaemonMessage) -> None:
        if message.error is not None:
            self.error = message.error
        if self.answered_init is None:
            self.answered_init = message.answered_init
        if message.is_ready:
            self.is_ready = True

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _exec_daemon(command: list[str], inherited_fds: list[int], keeper_pid: int) -> None:
    """Become the daemon, in the child; never returns."""
    try:
        signal.set_wakeup_fd(-1)
        syscalls.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != keeper_pid:  # the keeper ended before the signal was asked for
            os._exit(1)
        for fd in inherited_fds:
            os.set_inheritable(fd, True)
        os.execv(command[0], command)  # noqa: S606  descriptors and the parent stay as they are
    except BaseException:
        os._exit(127)
