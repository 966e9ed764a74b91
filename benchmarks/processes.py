"""Child processes, ports and mounts that never outlive the run: every wait here has a deadline."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fusecache.control.mountinfo import find_top_mount, read_mountinfo

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1
GRPC_OFFSET = 10000
_POLL = threading.Event()  # never set: a sleep that reads as what it is


class BenchmarkError(Exception):
    """Something that the run needs did not work; fit to print as one line."""


def pause(seconds: float) -> None:
    """Wait for `seconds`."""
    _POLL.wait(seconds)


def wait_until(done: Callable[[], bool], what: str, deadline: float) -> None:
    """Poll `done` for up to `deadline` seconds; raises BenchmarkError that names `what`."""
    end = time.monotonic() + deadline
    while not done():
        if time.monotonic() > end:
            raise BenchmarkError(f"{what}: not within {deadline:g} s")
        pause(0.02)


def free_port(*, with_grpc: bool = False) -> int:
    """A TCP port of the loopback that is free now; `with_grpc`: so is the one 10000 above it."""
    for _ in range(200):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if not with_grpc:
                return port
            if port + GRPC_OFFSET > 65535:
                # Ephemeral ports are mostly above: look below them.
                port = 10000 + port % 15000
            try:
                for number in {port, port + GRPC_OFFSET} - {int(first.getsockname()[1])}:
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise BenchmarkError("no free TCP port on the loopback")


def answers(port: int) -> bool:
    """Whether something accepts connections at this port of the loopback."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def program(name: str) -> str:
    """Path of a program: of this Python environment first, then of PATH; raises BenchmarkError."""
    folders = [
        sysconfig.get_path("scripts"),
        *os.environ.get("PATH", "").split(os.pathsep),
        "/usr/sbin",
        "/sbin",
    ]
    for folder in folders:
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise BenchmarkError(f"{name} is not installed: run scripts/setup test bench")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextlib.contextmanager
def running(
    arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None, *, grace: float = 10
) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the length of the block, output in `log`; TERM at the end, KILL after `grace` seconds.

    It has its own session, that ctrl-C reaches this program first and things end in their order.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield process
    finally:
        stop(process, grace)


def stop(process: subprocess.Popen[bytes], grace: float = 10) -> None:
    """End a process of `running` and its process group."""
    for number, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(arguments: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output; raises BenchmarkError with the end of what it printed."""
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, **(env or {})},
            timeout=timeout,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{Path(arguments[0]).name}: no end within {timeout:g} s") from None
    if done.returncode != 0:
        tail = (done.stderr.strip() or done.stdout.strip())[-600:]
        if "Traceback (most recent call last)" in done.stderr:
            tail = done.stderr.strip().splitlines()[-1]
        raise BenchmarkError(f"{Path(arguments[0]).name} exited with {done.returncode}: {tail}")
    return done.stdout


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly here; never touches the mount, which may hang."""
    return find_top_mount(path) is not None


def mounts_below(folder: Path) -> list[Path]:
    """Mountpoints in this folder, the innermost first."""
    below = [line.mountpoint for line in read_mountinfo() if folder in line.mountpoint.parents]
    return sorted(below, key=lambda path: len(path.parts), reverse=True)


def unmount(path: Path) -> None:
    """Unmount, gracefully for 10 seconds, then lazily; silent when nothing is mounted."""
    end = time.monotonic() + 10
    while is_mounted(path):
        late = time.monotonic() > end
        command = ["umount", *(["-l"] if late else []), str(path)]
        if os.geteuid() != 0:
            command = ["fusermount3", "-uz" if late else "-u", str(path)]
        with contextlib.suppress(BenchmarkError):
            run(command, timeout=20)
        if late and is_mounted(path):
            raise BenchmarkError(f"{path} cannot be unmounted")
        if is_mounted(path):
            pause(0.1)


@contextlib.contextmanager
def mounting(
    arguments: Sequence[str], mountpoint: Path, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A FUSE program that runs in the foreground, mounted for the length of the block."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    with running(arguments, log, env) as process:
        try:
            wait_until(
                lambda: is_mounted(mountpoint) or process.poll() is not None,
                f"{Path(arguments[0]).name} on {mountpoint}",
                30,
            )
            if process.poll() is not None:
                raise BenchmarkError(
                    f"{Path(arguments[0]).name} did not mount: {log.read_text()[-600:].strip()}"
                )
            yield process
        finally:
            unmount(mountpoint)


def end_cleanly_on_signals() -> None:
    """Let ctrl-C, SIGTERM and SIGHUP unwind through every context manager, undisturbed by a second one."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(_number: int, _frame: object) -> NoReturn:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, interrupt)


def clean_environment() -> None:
    """Forget this user's credentials, endpoints, options and proxies: the run uses its own server only."""
    for name in list(os.environ):
        own = name.startswith("FUSECACHE_") and name != "FUSECACHE_TEST_RUN"
        if own or name.startswith("AWS_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            del os.environ[name]
    # Nor their files: a profile there may name another endpoint.
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull


def python_module(name: str, *arguments: str) -> list[str]:
    """The command line that runs a module of this package with this interpreter, from any directory."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {name} import main; main(*sys.argv[1:])"
    return [sys.executable, "-c", code, *arguments]
