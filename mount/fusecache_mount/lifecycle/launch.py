"""The work of the mount command: check the mountpoint, mount, start the keeper, wait until the mount answers.

The command line runs `python -m fusecache_mount.lifecycle.launch --config FD [--foreground] [--nonempty]`. FD is a
memory file with MountConfig.dump_with_secrets(): no secret is in an argument or the environment. A failure is one line
on stderr and leaves neither a mount nor a process behind.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fusecache.config.model import MountConfig, make_default_cache_dir
from fusecache.control import mounts
from fusecache.control.memfd import make_sealed_memfd
from fusecache.errors import ConfigError, FusecacheError, MountError
from fusecache_mount.kernel.syscalls import wait_for_exit
from fusecache_mount.lifecycle import fuse_mount, mounting
from fusecache_mount.lifecycle.keeper_files import CONNECTION_OPTION, find_keeper_by_directory
from fusecache_mount.lifecycle.keeper_protocol import DAEMON_COMMAND, KEEPER_MODULE, KeeperSettings

_ANSWER_TIMEOUT = 30.0
"""Seconds in which a mount that is ready has to answer a statfs."""
_STATFS_TIMEOUT = 3.0
"""Seconds that a statfs of a mount may take, which may be dead."""
_KEEPER_EXIT_TIMEOUT = 15.0
"""Seconds that the keeper of an earlier mount, or of a failed one, gets to end."""
_FOREGROUND_STOP_DEADLINE = 8.0
"""Seconds; below the 10 s after which docker stop kills."""


def launch_mount(
    config: MountConfig,
    foreground: bool,
    *,
    nonempty: bool = False,
    daemon_command: Sequence[str] = DAEMON_COMMAND,
    ready_deadline: float = 600.0,
    stop_deadline: float = _FOREGROUND_STOP_DEADLINE,
    backoff: float = 1.0,
) -> None:
    """Mount; returns when the mount answers. With `foreground` this process becomes the keeper and does not return.
    `daemon_command` is the program that serves; `ready_deadline`, `stop_deadline` (seconds) and `backoff` (a factor)
    are those of KeeperSettings. Raises MountError and ConfigError."""
    mountpoint = check_mountpoint(config.mountpoint, nonempty=nonempty)
    config = config.model_copy(update={"mountpoint": mountpoint})
    _check_paths_outside(config)
    with contextlib.suppress(OSError):  # the store says what is wrong with the directory
        make_default_cache_dir(config.cache_dir)
    directory = mounts.make_mount_runtime_dir(config.runtime_dir, mountpoint)
    _check_earlier_mount_ended(mountpoint, directory)
    log = None if foreground else _open_log_file(config, directory)
    mounted = mounting.mount(mount_table_source(config), mountpoint, allow_other=config.allow_other)
    descriptors = [mounted.device_fd]
    started = False
    try:
        clones = mounting.clone_devices(mounted.device_fd, config.threads - 1)
        settings = KeeperSettings(
            mountpoint=str(mountpoint),
            connection=mounted.connection,
            mount_id=mounts.compute_mount_id(mountpoint),
            runtime_dir=str(config.runtime_dir),
            mount_runtime_dir=str(directory),
            is_privileged=mounted.is_privileged,
            unprivileged_reason=mounted.unprivileged_reason,
            log_file=str(config.log_file) if config.log_file else None,
            log_format=config.log_format,
            foreground=foreground,
            ready_deadline=ready_deadline,
            stop_deadline=stop_deadline,
            backoff=backoff,
            daemon_command=list(daemon_command),
        )
        given = make_sealed_memfd("fusecache-settings", settings.to_json())
        private = make_sealed_memfd("fusecache-config", config.dump_with_secrets())
        descriptors += [*clones, given, private]
        command = [sys.executable, "-P", "-m", KEEPER_MODULE, "--settings", str(given)]
        command += ["--device", str(mounted.device_fd), "--config", str(private)]
        command += ["--clones", ",".join(map(str, clones)), CONNECTION_OPTION, str(mounted.connection)]
        if foreground:
            _exec_keeper(command, descriptors)
        _start_keeper(command, descriptors, log, mountpoint)
        started = True
    finally:
        if not started:
            with contextlib.suppress(OSError):
                if fuse_mount.is_mounted(mountpoint, mounted.connection):
                    fuse_mount.unmount(mountpoint, lazy=True)
        for fd in descriptors:
            os.close(fd)
        if log is not None:
            os.close(log)


def mount_table_source(config: MountConfig) -> str:
    """The source that the mount table shows: the URL, which holds no password (SourceConfig refuses them), or
    "fusecache" for several sources."""
    return config.sources[0].url if len(config.sources) == 1 else "fusecache"


# -- checks


def check_mountpoint(path: Path, *, nonempty: bool = False) -> Path:
    """The real path of a directory that can be mounted on. May block for _STATFS_TIMEOUT seconds. Raises MountError,
    which says what to do, for any other path."""
    found = mounts.find_mount(path)
    if found is not None:
        number = statfs_errno(found.mountpoint)
        if number == errno.ENOTCONN:
            raise MountError(
                f"{path} is a stale mount, its daemon is gone: fusecache umount {path}, then mount again"
            )
        if number is None:
            raise MountError(
                f"{path} is a fusecache mount that does not answer: fusecache umount --lazy {path}, then mount again"
            )
        raise MountError(
            f"{path} is already a fusecache mount of {found.source}: fusecache umount {path} first"
        )
    real = mounts.resolve_mountpoint(path)
    try:
        with os.scandir(real) as entries:
            first = next(entries, None)
    except FileNotFoundError:
        raise MountError(f"{path} does not exist: mkdir -p {path}") from None
    except NotADirectoryError:
        raise MountError(f"{path} is not a directory") from None
    except PermissionError:
        raise MountError(f"{path}: permission denied: choose a directory of yours") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountError(
                f"{path} is a stale mount of another FUSE file system: umount -l {path}"
            ) from None
        raise MountError(f"{path}: {error.strerror}") from None
    if first is not None and not nonempty:
        raise MountError(
            f"{path} is not empty (it holds {first.name!r}): choose an empty directory, or -o nonempty to hide it"
        )
    return real


def statfs_errno(mountpoint: Path) -> int | None:
    """The errno of a statfs, 0 when it succeeds; None when there is no answer within _STATFS_TIMEOUT seconds."""
    found: list[int] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
            found.append(0)
        except OSError as error:
            found.append(error.errno or errno.EIO)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_STATFS_TIMEOUT)
    return found[0] if found else None


def _check_paths_outside(config: MountConfig) -> None:
    for name in ("cache_dir", "memory_dir", "runtime_dir", "log_file"):
        path = getattr(config, name)
        if path is not None and Path(os.path.realpath(path)).is_relative_to(config.mountpoint):
            raise ConfigError(f"{name} {path} is inside the mountpoint: choose another")
    for source in config.sources:
        if source.url.startswith("file://"):
            path = Path(os.path.realpath(source.url.removeprefix("file://")))
            if path.is_relative_to(config.mountpoint) or config.mountpoint.is_relative_to(path):
                raise ConfigError(
                    f"{source.url} and the mountpoint lie in each other: listing it would wait for itself"
                )


def _check_earlier_mount_ended(mountpoint: Path, mount_runtime_dir: Path) -> None:
    """Wait for the keeper of an earlier mount, which lives on after an unmount until its files are closed. Raises
    MountError when it does not end in time."""
    pid = find_keeper_by_directory(mount_runtime_dir)
    if pid is not None and not wait_for_exit(pid, _KEEPER_EXIT_TIMEOUT):
        raise MountError(
            f"{mountpoint}: files of the earlier mount are still open (its keeper is process {pid}): close them, "
            f"or kill {pid} and mount again"
        )


def _open_log_file(config: MountConfig, mount_runtime_dir: Path) -> int:
    path = config.log_file or mount_runtime_dir / mounts.LOG_NAME
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"log_file {path}: {error.strerror}") from None


# -- the keeper


def _exec_keeper(command: list[str], descriptors: list[int]) -> NoReturn:
    for fd in descriptors:
        os.set_inheritable(fd, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606  the first process of a container has to stay the first


def _start_keeper(command: list[str], descriptors: list[int], log_fd: int | None, mountpoint: Path) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        process = subprocess.Popen(
            [*command, "--report", str(writing)],
            pass_fds=[*descriptors, writing],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(writing)
    try:
        with os.fdopen(reading, "rb") as report:
            _check_keeper_report(report.readline)
        _wait_for_answer(mountpoint)
    except BaseException:
        # The keeper unmounts when it ends, for any reason: wait for it, so that a second try finds no mount.
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KEEPER_EXIT_TIMEOUT)
        raise
    process.returncode = 0  # it lives on, and Popen shall not warn of that


def _check_keeper_report(readline: Callable[[], bytes]) -> None:
    """Block for the keeper's report, or its end; the keeper has deadlines of its own. Raises MountError unless the
    mount is ready."""
    line = readline()
    try:
        message = json.loads(line)
    except ValueError:
        raise MountError("the keeper ended before the mount was ready: see the log") from None
    if message.get("ready") is not True:
        raise MountError(str(message.get("error")))


def _wait_for_answer(mountpoint: Path) -> None:
    until = time.monotonic() + _ANSWER_TIMEOUT
    while (number := statfs_errno(mountpoint)) is None and time.monotonic() < until:
        pass
    if number is None:
        raise MountError(f"{mountpoint} does not answer within {_ANSWER_TIMEOUT:g} s: see the log")
    if number not in (0, errno.EACCES):
        raise MountError(f"{mountpoint}: {os.strerror(number)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount as the memory file says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fusecache-launch")
    parser.add_argument("--config", type=int, required=True)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--nonempty", action="store_true")
    given = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        with os.fdopen(given.config, "rb") as file:
            file.seek(0)
            config = MountConfig.load_with_secrets(file.read())
        launch_mount(config, given.foreground, nonempty=given.nonempty)
    except KeyboardInterrupt:
        print("fusecache: interrupted", file=sys.stderr)
        return 130
    except FusecacheError as error:
        print(f"fusecache: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        print(f"fusecache: mount: {error.filename or ''} {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
