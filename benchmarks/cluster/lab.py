"""A network on one machine: a namespace per host, veth pairs to a bridge, and `tc tbf` on both ends of each.

Processes are put into a namespace with nsenter --net, which leaves the mount namespace alone: a FUSE mount made there
is seen everywhere. Names carry the pid of this process; what an earlier one left behind is removed at the start.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import BenchmarkError, run

MTU = 9000
"""As GPU clusters have it; of each packet 0.7 % is headers."""
_TIMEOUT = 30.0
_LATENCY = "100ms"
"""Of a full queue: at 5 to 12 MB/s some five blocks of the lab's, which is in proportion to what the ports of a data
centre's switches hold. With 20 ms, which is a dozen packets, a fifth of what was sent was dropped and sent again."""
_NAME = re.compile(r"fc(\d+)(?:n\d+|h\d+|b)")


@dataclass
class Host:
    """One namespace. `rate` is in bytes per second each way, None: unlimited."""

    name: str
    namespace: str
    address: str
    outside: str
    """Its link as the bridge sees it."""
    rate: float | None

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs a program there."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *arguments]

    def limit(self, rate: float | None) -> None:
        """Set the limit of both directions."""
        self.rate = rate
        for prefix, device in ((["ip", "netns", "exec", self.namespace], "eth0"), ([], self.outside)):
            if rate is None:
                with contextlib.suppress(BenchmarkError):
                    run([*prefix, "tc", "qdisc", "del", "dev", device, "root"], timeout=_TIMEOUT)
                continue
            # a GSO packet of 64 KiB has to fit in
            burst = max(128 * 1024, int(rate / 200))
            command = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{int(rate * 8)}bit"]
            run([*prefix, *command, "burst", str(burst), "latency", _LATENCY], timeout=_TIMEOUT)

    def cut(self, connected: bool = False) -> None:
        """Take the host off the network, or back onto it."""
        run(["ip", "link", "set", self.outside, "up" if connected else "down"], timeout=_TIMEOUT)

    def sent(self) -> int:
        """Bytes that left the host so far."""
        found = json.loads(run(["ip", "-j", "-s", "link", "show", "dev", self.outside], timeout=_TIMEOUT))
        return int(found[0]["stats64"]["rx"]["bytes"])


class Lab:
    """Hosts on one bridge. A context manager; raises BenchmarkError where namespaces can't be made."""

    def __init__(self) -> None:
        self._tag = f"fc{os.getpid()}"
        self._hosts: list[Host] = []
        self._network = _free_network()
        self._bridge = f"{self._tag}b"

    @property
    def gateway(self) -> str:
        """This machine's own address on the bridge, whose link has no limit."""
        return str(self._network[1])

    def __enter__(self) -> Lab:
        _remove_stale()
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self._network[1]}/{self._network.prefixlen}", "dev", self._bridge)
            _ip("link", "set", self._bridge, "mtu", str(MTU), "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for host in self._hosts:
            with contextlib.suppress(BenchmarkError):
                _ip("netns", "del", host.namespace)
            with contextlib.suppress(BenchmarkError):
                _ip("link", "del", host.outside)
        with contextlib.suppress(BenchmarkError):
            _ip("link", "del", self._bridge)

    def host(self, name: str, rate: float | None = None) -> Host:
        """Add a host with this limit."""
        number = len(self._hosts) + 1
        address = str(self._network[number + 1])
        host = Host(name, f"{self._tag}n{number}", address, f"{self._tag}h{number}", rate)
        self._hosts.append(host)
        _ip("netns", "add", host.namespace)
        peer = ["peer", "name", "eth0", "netns", host.namespace, "mtu", str(MTU)]
        _ip("link", "add", host.outside, "mtu", str(MTU), "type", "veth", *peer)
        _ip("link", "set", host.outside, "master", self._bridge, "up")
        inside = ["-n", host.namespace]
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "addr", "add", f"{address}/{self._network.prefixlen}", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        if rate is not None:
            host.limit(rate)
        return host


@contextlib.contextmanager
def laboratory() -> Iterator[Lab]:
    """A Lab for the length of the block."""
    with Lab() as lab:
        yield lab


@functools.cache
def possible() -> str:
    """Why no lab can be made here; empty: it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Lab() as lab:
            lab.host("probe", 1e6)
    except BenchmarkError as error:
        return str(error)
    return ""


def _ip(*arguments: str) -> None:
    run(["ip", *arguments], timeout=_TIMEOUT)


def _free_network() -> ipaddress.IPv4Network:
    """A /20 that no route of this machine covers."""
    told = subprocess.run(
        ["ip", "-j", "route", "show", "table", "all"], capture_output=True, timeout=_TIMEOUT, check=False
    )
    used = []
    for route in json.loads(told.stdout or b"[]"):
        with contextlib.suppress(ValueError):
            used.append(ipaddress.ip_network(route.get("dst", ""), strict=False))
    for number in range(256):
        network = ipaddress.IPv4Network(f"10.{213 + number // 16}.{number % 16 * 16}.0/20")
        if not any(isinstance(other, ipaddress.IPv4Network) and other.overlaps(network) for other in used):
            return network
    raise BenchmarkError("no free network below 10.0.0.0/8")


def _remove_stale() -> None:
    """Remove the namespaces and links that the lab of a process which is no more left behind."""
    links = json.loads(run(["ip", "-j", "link"], timeout=_TIMEOUT))
    spaces = [path.name for path in Path("/run/netns").glob("fc*")] if Path("/run/netns").is_dir() else []
    for name, kind in [(name, "netns") for name in spaces] + [(link["ifname"], "link") for link in links]:
        match = _NAME.fullmatch(name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with contextlib.suppress(BenchmarkError):
                _ip(kind, "del", name)
