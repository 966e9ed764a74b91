"""A real etcd on free ports of the loopback, which can be killed and started again with its data."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers import free_port, program, running, wait_until


class EtcdServer:
    """`url` is for clients. `start` and `stop` (kill -9) may alternate."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._port, self._peer = free_port(), free_port()
        self._stack = contextlib.ExitStack()
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Returns when it answers."""
        peer = f"http://127.0.0.1:{self._peer}"
        command = [
            program("etcd"),
            "--name=one",
            f"--data-dir={self._work / 'etcd'}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=one={peer}",
            "--log-level=warn",
        ]
        self._stack.enter_context(running(command, self._work / "etcd.log"))
        wait_until(self._answers, "etcd", 30)

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=2) as answer:
                return b"true" in answer.read()
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """kill -9."""
        self._stack.close()


@contextlib.contextmanager
def etcd(work: Path) -> Iterator[EtcdServer]:
    """One that is not started yet, and is gone after the block."""
    server = EtcdServer(work)
    try:
        yield server
    finally:
        server.stop()
