"""The daemon's side of its keeper: the descriptors that it inherits, and the messages."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from fusecache_mount.lifecycle.keeper_protocol import MAX_MESSAGE_BYTES, DaemonMessage, StartMessage


@dataclass(frozen=True)
class KeeperLink:
    """The descriptors and facts that a daemon has from its keeper."""

    device_fd: int
    clone_fds: Sequence[int]
    keeper_socket: socket.socket
    start_message: StartMessage

    @property
    def answered_init(self) -> bytes | None:
        """The kernel's INIT request, if an earlier daemon on this device answered it."""
        return self.start_message.answered_init

    def send_message(self, message: DaemonMessage) -> None:
        """Send the keeper a message; does not block. A keeper that is gone is no reason to stop serving."""
        send_to_keeper(self.keeper_socket, message)


def receive_start_message(keeper_socket: socket.socket) -> StartMessage:
    """The first message of the keeper; blocks until it comes. Raises ValueError and OSError."""
    return StartMessage.from_json(keeper_socket.recv(MAX_MESSAGE_BYTES))


def send_to_keeper(keeper_socket: socket.socket, message: DaemonMessage) -> None:
    """Send a message, also when the start failed before there was a KeeperLink. Raises nothing."""
    with contextlib.suppress(OSError):
        keeper_socket.send(message.to_json())
