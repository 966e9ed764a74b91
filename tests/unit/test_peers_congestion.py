"""The congestion control of the exchange: what a server's connections have, at its end."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from fusecache.errors import ConfigError
from fusecache.peers.transport.congestion import read_congestion_control, set_congestion_control

_KNOWN = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()


async def accepted_with(system: str, wanted: str) -> str:
    """The algorithm of a connection to a listener that would have `system`."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, system.encode())
        set_congestion_control(listener.socket, wanted)
        client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        async with client, await listener.accept() as stream:
            return read_congestion_control(stream.socket)


@pytest.mark.parametrize("system", sorted({"reno", "bbr", "cubic"} & set(_KNOWN)))
async def test_the_system_decides_unless_it_says_bbr(system: str) -> None:
    expected = "cubic" if system == "bbr" and "cubic" in _KNOWN else system
    assert await accepted_with(system, "") == expected


@pytest.mark.parametrize("wanted", sorted({"reno", "bbr"} & set(_KNOWN)))
async def test_what_is_configured_is_set(wanted: str) -> None:
    assert await accepted_with("reno", wanted) == wanted


async def test_a_name_that_the_kernel_does_not_have_is_a_clear_error() -> None:
    with pytest.raises(
        ConfigError, match=r"peers\.congestion=nosuch: not known to the kernel: choose one of"
    ):
        await accepted_with("reno", "nosuch")
