"""Helpers for tests of a real mount while it lives: look, kill, wait for one thing, read in the background."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from fusecache.config.model import default_runtime_dir
from fusecache.control import client, mounts
from fusecache_mount.lifecycle import fuse_mount
from fusecache_mount.lifecycle.keeper_files import find_keeper_by_connection
from tests.support.content import check
from tests.support.faulty import FaultyServer, Request
from tests.support.kept import ended
from tests.support.logs import WATCH
from tests.support.mounting import RealMount
from tests.support.servers import wait_until

T = TypeVar("T")

MIB = 1 << 20
HANG = 20.0
"""Seconds after which whatever a test waits for hangs."""


def status(mount: RealMount) -> dict[str, Any]:
    """`fusecache status --json`."""
    done = mount.command("status", str(mount.path), "--json")
    return dict(json.loads(done.stdout))


def asked(mount: RealMount, operation: str, **arguments: Any) -> Any:
    """The answer of the daemon itself: quicker than the command."""
    found = mounts.find_mount(mount.path)
    assert found is not None
    return client.call_daemon(
        mounts.find_control_socket(found, default_runtime_dir(mount.env), mount.env),
        operation,
        timeout=HANG,
        **arguments,
    )


def keeper_pid(mount: RealMount) -> int:
    """The keeper of a mount, also when its daemon does not answer."""
    device = fuse_mount.device_number_of(mount.path)
    assert device is not None
    pid = find_keeper_by_connection(fuse_mount.connection_number(device))
    assert pid is not None
    return pid


def kill(pid: int) -> None:
    """kill -9, and wait for the end."""
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)


def kill_daemon(mount: RealMount) -> int:
    """kill -9 of the daemon that serves now; returns its pid."""
    pid = int(asked(mount, "status")["process"]["pid"])
    WATCH.expect("the daemon ended with signal SIGKILL")
    kill(pid)
    return pid


def background(work: Callable[[], T]) -> Future[T]:
    """Run in a thread that keeps nothing alive, so that what hangs fails its test and no more."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def in_time(work: Callable[[], T], seconds: float = HANG) -> T:
    """The result of `work`, which must not take longer than this."""
    return background(work).result(seconds)


def read_file(path: Path) -> bytes:
    """All of a file; fails instead of hanging."""
    return in_time(path.read_bytes)


def dropped(fd: int) -> int:
    """The descriptor, after its pages left the page cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def is_right(path: Path, key: str, size: int, version: int | str = 1) -> None:
    """Every byte of the file is that of this version, read anew."""
    fd = os.open(path, os.O_RDONLY)
    try:
        data = in_time(functools.partial(os.pread, dropped(fd), size + 1, 0))
    finally:
        os.close(fd)
    assert len(data) == size
    check(data, key, version)


def cached(path: Path) -> int:
    """Bytes of a file in the cache."""
    return int(os.getxattr(path, "user.fusecache.cached_bytes"))


def wait_cached(path: Path, size: int) -> None:
    """Wait until so much of the file is in the cache."""
    wait_until(lambda: cached(path) >= size, f"{size} bytes of {path.name} in the cache", HANG)


def spans(requests: Iterable[Request], key: str) -> list[tuple[int, int]]:
    """The [start, stop) that range requests for this key asked for, in order."""
    found = []
    for request in requests:
        spec = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if spec and request.path.endswith(f"/{key}"):
            found.append((int(spec[1]), int(spec[2]) + 1))
    return found


def starts_at(key: str, offset: int) -> Callable[[Request], bool]:
    """Matches the range requests that begin at this byte of the object."""
    return lambda request: any(start == offset for start, _ in spans([request], key))


def covers(key: str, offset: int) -> Callable[[Request], bool]:
    """Matches the range requests that bring this byte of the object."""
    return lambda request: any(start <= offset < stop for start, stop in spans([request], key))


class Gate:
    """Holds back the range requests that match, all of them, until it is opened."""

    def __init__(self, proxy: FaultyServer, match: Callable[[Request], bool]) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        proxy.before(self._hold, match=match)

    def _hold(self) -> None:
        self.reached.set()
        self._open.wait(2 * HANG)

    def wait(self) -> None:
        """Until a request is held."""
        assert self.reached.wait(HANG), "no request came to the gate"

    def open(self) -> None:
        """Let go."""
        self._open.set()
