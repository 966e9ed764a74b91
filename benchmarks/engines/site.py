"""Where it is measured: an S3 server in one network namespace, everything else in another, a limited link between them.

The benchmark itself goes to the second one while it measures, so that every tool runs as it does anywhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cluster.fleet import origin
from benchmarks.cluster.lab import Host, Lab
from benchmarks.processes import BenchmarkError
from benchmarks.tools import Bucket

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Site:
    """The two hosts, and the bucket; its prefix is replaced by what a stage reads."""

    source: Host
    node: Host
    bucket: Bucket
    work: Path

    @contextlib.contextmanager
    def on_node(self, rate: float | None) -> Iterator[None]:
        """This thread, and the processes it starts, are on the node; both links have this limit, in bytes per second,
        None: no limit."""
        for host in (self.source, self.node):
            host.limit(rate)
        with entered(Path("/run/netns") / self.node.namespace):
            yield

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """An empty folder for one mount and its cache, gone after the block."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def site(work: Path, bucket: str) -> Iterator[Site]:
    """A site whose S3 server has an empty bucket. Raises BenchmarkError where namespaces can't be made."""
    with Lab() as lab, origin(lab, work, bucket) as (source, there):
        yield Site(source, lab.host("node"), there, work)


@contextlib.contextmanager
def entered(namespace: Path) -> Iterator[None]:
    """This thread, and the processes it starts, are in this network namespace. Raises BenchmarkError."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_namespace(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _set_namespace(home)
    finally:
        os.close(home)


def _set_namespace(descriptor: int) -> None:
    # os.setns came with Python 3.12
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise BenchmarkError(f"setns: {os.strerror(ctypes.get_errno())}")


def busy_ticks() -> tuple[int, int]:
    """(idle, all) ticks of all CPUs since the start of the machine."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


class Busy:
    """The share of the CPUs' time that was not idle, between its making and `share`."""

    def __init__(self) -> None:
        self._idle, self._all = busy_ticks()

    def share(self) -> float:
        """0 to 1."""
        idle, total = busy_ticks()
        return 1 - (idle - self._idle) / max(1, total - self._all)
