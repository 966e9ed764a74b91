"""The congestion control of what a node sends to others.

BBR sends by a timer per connection. Between neighbours that gains nothing and costs CPU: over the loopback one iperf3
moves 2.6 GB/s with it and 4.6 GB/s with CUBIC on the same machine. So where BBR is the system's choice, which is made
with distant clients in mind, CUBIC takes its place, unless `peers.congestion` names another algorithm.
"""

from __future__ import annotations

import contextlib
import errno
import socket

import trio

from fusecache.errors import ConfigError

_MAX_NAME_BYTES = 16
"""TCP_CA_NAME_MAX, tcp.h."""
_AVAILABLE_PATH = "/proc/sys/net/ipv4/tcp_available_congestion_control"


def read_congestion_control(sock: trio.socket.SocketType) -> str:
    """The name of the congestion control of a TCP socket."""
    name: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _MAX_NAME_BYTES)
    return name.rstrip(b"\0").decode("ascii", "replace")


def set_congestion_control(listener: trio.socket.SocketType, algorithm: str) -> None:
    """Choose the algorithm of all connections that the listener accepts; "": the system's, but CUBIC instead of BBR.
    Raises ConfigError when the kernel does not have the algorithm."""
    if not algorithm:
        if read_congestion_control(listener).startswith("bbr"):
            with contextlib.suppress(OSError):  # it stays as it is
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        return
    try:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
    except OSError as error:
        reason = "not known to the kernel" if error.errno == errno.ENOENT else error.strerror
        raise ConfigError(
            f"peers.congestion={algorithm}: {reason}: choose one of those in {_AVAILABLE_PATH}"
        ) from None
