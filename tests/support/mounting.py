"""Real mounts, made with the command that a user types."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.logs import WATCH
from tests.support.servers import S3Server

_DEADLINE = 60.0

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse can't be opened here"
)


@contextlib.contextmanager
def tmpfs(path: Path, mib: int) -> Iterator[Path]:
    """A file system of its own of so many MiB, unmounted in the end; where there can be none, the test is skipped."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)]
    if subprocess.run(words, check=False).returncode:
        pytest.skip("a tmpfs can't be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@dataclass(frozen=True)
class RealMount:
    """A mount that answers at `path`."""

    path: Path
    env: Mapping[str, str]

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `fusecache ARGUMENTS` beside it."""
        return command(*arguments, env=self.env, check=check)


def command(
    *arguments: str, env: Mapping[str, str] | None = None, check: bool = True, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `fusecache ARGUMENTS`, by the command `prefix`; its output is in the error when it fails."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "fusecache.cli.main", *arguments],
        env=os.environ if env is None else env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_DEADLINE,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"fusecache {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done


def s3_environment(server: S3Server, endpoint: str | None = None) -> dict[str, str]:
    """The environment of a user of this server, or of a proxy in front of it."""
    return {
        **os.environ,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_ENDPOINT_URL": endpoint or server.endpoint,
        "AWS_REGION": server.region,
    }


@contextlib.contextmanager
def mounted(
    source: str | None,
    work: Path,
    *,
    env: Mapping[str, str] | None = None,
    config: Path | None = None,
    prefix: Sequence[str] = (),
    **options: object,
) -> Iterator[RealMount]:
    """`fusecache mount SOURCE work/mnt -o options`, unmounted at the end whatever happened."""
    mountpoint = work / "mnt"
    mountpoint.mkdir(exist_ok=True)
    given = {"cache_dir": work / "cache", "cache_size": "1GiB", "runtime_dir": work / "run"} | options
    arguments = ["mount", *([source] if source else []), str(mountpoint)]
    arguments += ["-o", ",".join(f"{key}={value}" for key, value in given.items())]
    if config is not None:
        arguments += ["--config", str(config)]
    environment = {**(os.environ if env is None else env), "FUSECACHE_RUNTIME_DIR": str(work / "run")}
    WATCH.watch(Path(str(given["runtime_dir"])), "*/log")
    if "log_file" in given:
        log_file = Path(str(given["log_file"]))
        WATCH.watch(log_file.parent, log_file.name)
    command(*arguments, env=environment, prefix=prefix)
    try:
        yield RealMount(mountpoint, environment)
    finally:
        done = command("umount", str(mountpoint), env=environment, check=False)
        if os.path.ismount(mountpoint):
            subprocess.run(["umount", "--lazy", str(mountpoint)], check=False, capture_output=True)
            raise AssertionError(f"the mount stayed: {done.stdout}{done.stderr}")


def failing(call: Callable[[], object]) -> str:
    """The name of the errno that a call fails with, like EROFS."""
    try:
        result = call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    raise AssertionError(f"it did not fail, but returned {result!r}")
