"""`fusecache mount` and `umount`, mount(8) and fstab, with the real daemon on real mounts."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusecache_mount.lifecycle import fuse_mount, mounting
from fusecache_mount.lifecycle.keeper_files import find_keeper_by_connection, find_keeper_by_directory
from tests.support.content import content
from tests.support.kept import ended
from tests.support.mounting import command, needs_fuse

pytestmark = needs_fuse
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")

_SIZE = 3_000_001
_FUSECACHE = (sys.executable, "-m", "fusecache.cli.main")
_HELPER = Path("/sbin/mount.fuse.fusecache")


@dataclass
class Place:
    """A source directory, a mountpoint, and options that keep everything below one temporary directory."""

    work: Path

    @property
    def source(self) -> Path:
        return self.work / "source"

    @property
    def mountpoint(self) -> Path:
        return self.work / "mnt"

    @property
    def options(self) -> str:
        return f"cache_dir={self.work}/cache,runtime_dir={self.work}/run,cache_size=64MiB"

    @property
    def connection(self) -> int | None:
        device = fuse_mount.device_number_of(self.mountpoint)
        return None if device is None else fuse_mount.connection_number(device)

    @property
    def keeper(self) -> int:
        connection = self.connection
        assert connection is not None
        pid = find_keeper_by_connection(connection)
        assert pid is not None
        return pid

    @property
    def daemon(self) -> int:
        """Its status answers: the pid of the daemon that serves now."""
        done = command("status", str(self.mountpoint), "--json", env=self.env)
        return int(json.loads(done.stdout)["process"]["pid"])

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "FUSECACHE_RUNTIME_DIR": str(self.work / "run")}

    def mount(self, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return command(
            "mount", f"file://{self.source}", str(self.mountpoint), "-o", self.options, *more, check=check
        )

    def umount(self, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return command("umount", str(self.mountpoint), *more, check=check)

    def is_right(self) -> bool:
        return (self.mountpoint / "model" / "shard").read_bytes() == content("model/shard", 1, 0, _SIZE)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    made.mountpoint.mkdir()
    (made.source / "model").mkdir(parents=True)
    (made.source / "model" / "shard").write_bytes(content("model/shard", 1, 0, _SIZE))
    try:
        yield made
    finally:
        while (connection := made.connection) is not None:
            fuse_mount.abort_connection(connection)
            pid = find_keeper_by_connection(connection)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                ended(pid)
            fuse_mount.unmount(made.mountpoint, lazy=True, force=True)


@pytest.fixture
def helper() -> Iterator[None]:
    """mount(8) looks for its helpers in /sbin only: scripts/setup makes the link; if not, make it for this test."""
    link = None
    if not _HELPER.exists():
        target = Path(sys.executable).with_name("mount.fusecache")
        if not target.exists() or not os.access("/sbin", os.W_OK):
            pytest.skip("mount.fusecache is not installed")
        _HELPER.symlink_to(target)
        link = _HELPER
    yield
    if link is not None:
        link.unlink()


def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=env)


# -- fusecache mount, umount


def test_mount_read_umount(place: Place) -> None:
    done = place.mount()
    assert (done.stdout, done.stderr) == ("", "")
    assert place.is_right()
    pid, daemon = place.keeper, place.daemon
    done = place.umount()
    assert (done.stdout, done.stderr) == ("", "")
    assert place.connection is None
    for process in (pid, daemon):
        assert ended(process)
    assert place.umount(check=False).stderr == f"fusecache: {place.mountpoint} is not mounted\n"


def test_output_is_not_held_open(place: Place) -> None:
    """A script that reads our output must not wait for the keeper."""
    with subprocess.Popen(
        [*_FUSECACHE, "mount", str(place.source), str(place.mountpoint), "-o", place.options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        out, _ = process.communicate(timeout=60)
    assert out == b""
    assert place.is_right()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-o", "cache_sise=1G"], 2, "-o cache_sise: unknown option: did you mean cache_size?"),
        (["-o", "rw"], 2, "-o rw: fusecache is a read-only file system"),
        (["--config", "/nonexistent/f.toml"], 2, "/nonexistent/f.toml"),
        (["-o", "cache_dir=/proc/nothing"], 1, "/proc/nothing"),
    ],
)
def test_mistakes_are_one_line(place: Place, words: list[str], code: int, message: str) -> None:
    done = place.mount(*words, check=False)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == code
    assert place.connection is None


def test_a_source_that_does_not_exist(place: Place) -> None:
    missing = place.work / "missing"
    done = command("mount", f"file://{missing}", str(place.mountpoint), "-o", place.options, check=False)
    assert done.returncode == 1
    assert str(missing) in done.stderr
    assert done.stderr.count("\n") == 1
    assert place.connection is None
    assert find_keeper_by_directory(next((place.work / "run").iterdir())) is None


def test_nonempty(place: Place) -> None:
    (place.mountpoint / "precious").touch()
    done = place.mount(check=False)
    assert "is not empty (it holds 'precious')" in done.stderr
    place.mount("-o", "nonempty")
    assert place.is_right()


def test_several_sources_from_a_config_file(place: Place) -> None:
    config = place.work / "fusecache.toml"
    sources = "".join(f'[[source]]\nname = "{name}"\nurl = "{place.source}"\n' for name in ("one", "two"))
    config.write_text(f'cache_dir = "{place.work}/cache"\nruntime_dir = "{place.work}/run"\n{sources}')
    command("mount", str(place.mountpoint), "--config", str(config))
    assert sorted(os.listdir(place.mountpoint)) == ["one", "two"]
    assert (place.mountpoint / "two" / "model" / "shard").stat().st_size == _SIZE
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    assert [line.split()[0] for line in mounts if str(place.mountpoint) in line] == ["fusecache"]


def test_a_killed_daemon_comes_back_under_a_reader(place: Place) -> None:
    place.mount("-o", "passthrough=off,verify=start")
    expected = content("model/shard", 1, 0, _SIZE)
    with (place.mountpoint / "model" / "shard").open("rb", buffering=0) as file:
        assert file.read(1000) == expected[:1000]
        first = place.daemon
        os.kill(first, signal.SIGKILL)
        assert ended(first)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 1000, _SIZE - 1000) == expected[-1000:]
    assert place.is_right()
    assert place.daemon != first
    place.umount()


def test_an_upgrade_under_a_reader(place: Place) -> None:
    place.mount()
    with (place.mountpoint / "model" / "shard").open("rb", buffering=0) as file:
        first = place.daemon
        os.kill(place.keeper, signal.SIGUSR1)
        assert ended(first)
        assert os.pread(file.fileno(), 1000, 0) == content("model/shard", 1, 0, 1000)
    assert place.is_right()
    status = json.loads(command("status", str(place.mountpoint), "--json", env=place.env).stdout)
    assert status["process"]["pid"] != first
    assert status["process"]["restarts"] == 0
    assert status["process"]["keeper_pid"] == place.keeper


def test_busy_with_a_mapping(place: Place) -> None:
    place.mount()
    script = (
        "import mmap, os; f = os.open('model/shard', os.O_RDONLY); m = mmap.mmap(f, 0, prot=mmap.PROT_READ)\n"
        "os.close(f); os.chdir('/'); print(m[0], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=place.mountpoint, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        done = place.umount("--timeout", "0", check=False)
        assert f"({process.pid})" in done.stderr
        assert done.returncode == 1
        process.communicate(b"\n")
    place.umount()


# -- foreground, as in a container


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_foreground_ends_with_a_signal(place: Place, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*_FUSECACHE, "mount", "-f", str(place.source), str(place.mountpoint), "-o", place.options],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "the daemon serves the mount" in line:
                break
        assert place.is_right()
        assert place.keeper == process.pid
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert place.connection is None


def test_foreground_says_why_not(place: Place) -> None:
    done = command(
        "mount", f"file://{place.work}/missing", str(place.mountpoint), "-o", place.options, "-f", check=False
    )
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("fusecache: ")]
    assert place.connection is None


@needs_root
def test_as_the_first_process_of_a_container(place: Place) -> None:
    """It gets the orphans of others, and signals only if it asks for them."""
    inside = f"mount -t proc proc /proc && exec {sys.executable} -m fusecache.cli.main mount"
    inside += f" file://{place.source} {place.mountpoint} -o {place.options} --foreground"
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount", "--propagation", "private", "sh", "-c", inside],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "the daemon serves the mount" in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_interrupted_while_it_starts(place: Place) -> None:
    """The first listing hangs; Ctrl-C leaves nothing behind."""
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as accepted:
        taken = threading.Event()

        def accept() -> None:
            with contextlib.suppress(OSError):
                accepted.enter_context(silent.accept()[0])
                taken.set()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = f"{place.options},endpoint_url={endpoint},anonymous"
        process = subprocess.Popen(
            [*_FUSECACHE, "mount", "s3://b", str(place.mountpoint), "-o", options],
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        with process:
            assert taken.wait(30)
            pid = place.keeper
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.count(b"\n") == 1
    assert place.connection is None
    assert ended(pid)


# -- mount(8)


@needs_root
@pytest.mark.usefixtures("helper")
@pytest.mark.parametrize("environment", ["usual", "empty"])
def test_mount_8(place: Place, environment: str) -> None:
    options = f"ro,_netdev,nofail,x-systemd.automount,noatime,{place.options}"
    words = ["mount", "-t", "fuse.fusecache", f"file://{place.source}", str(place.mountpoint), "-o", options]
    done = run("/bin/" + words[0], *words[1:], env={} if environment == "empty" else None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert place.is_right()
    done = run("umount", str(place.mountpoint))
    assert done.returncode == 0
    assert place.connection is None


@needs_root
@pytest.mark.usefixtures("helper")
def test_mount_8_fails_with_its_status(place: Place) -> None:
    words = ["mount", "-t", "fuse.fusecache", f"file://{place.source}", str(place.mountpoint)]
    done = run(*words, "-o", f"{place.options},cache_sise=1")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        1,
        "fusecache: -o cache_sise: unknown option: did you mean cache_size?",
    )
    (place.mountpoint / "precious").touch()
    done = run(*words, "-o", place.options)
    assert done.returncode == 32
    assert "is not empty" in done.stderr


@needs_root
@pytest.mark.usefixtures("helper")
def test_fstab(place: Place) -> None:
    config = place.work / "fusecache.toml"
    config.write_text(
        f'cache_dir = "{place.work}/cache"\nruntime_dir = "{place.work}/run"\n[[source]]\nurl = "{place.source}"\n'
    )
    fstab = place.work / "fstab"
    fstab.write_text(
        f"file://{place.source} {place.mountpoint} fuse.fusecache ro,nofail,_netdev,{place.options} 0 0\n"
    )
    done = run("mount", "-T", str(fstab), str(place.mountpoint))
    assert (done.returncode, done.stderr) == (0, "")
    assert place.is_right()
    again = run("mount", "-a", "-T", str(fstab))
    assert (again.returncode, again.stderr) == (0, "")
    assert run("umount", str(place.mountpoint)).returncode == 0
    fstab.write_text(f"none {place.mountpoint} fuse.fusecache ro,config={config} 0 0\n")
    done = run("mount", "-a", "-T", str(fstab))
    assert (done.returncode, done.stderr) == (0, "")
    assert place.is_right()


@needs_root
def test_the_call_of_mount_fuse(place: Place) -> None:
    """util-linux falls back to /sbin/mount.fuse, which calls `fusecache SOURCE MOUNTPOINT -o OPTIONS`."""
    command(f"file://{place.source}", str(place.mountpoint), "-o", f"rw,{place.options},dev,suid")
    assert place.is_right()
    options = next(
        line.split()[3]
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if str(place.mountpoint) in line
    )
    assert {"ro", "nodev", "nosuid"} <= set(options.split(","))


@needs_root
def test_fusermount(place: Place) -> None:
    """The way of users without privileges; root may go it, too."""
    if fuse_mount.find_fusermount() is None:
        pytest.skip("fusermount3 is not installed")
    device = mounting._mount_by_fusermount("s3://b/a,b\\c", place.mountpoint, False, "denied")
    try:
        assert place.connection is not None
        assert not os.get_inheritable(device)
        line = next(
            line for line in Path("/proc/self/mounts").read_text().splitlines() if str(place.work) in line
        )
        assert line.split()[0] == "s3://b/a,b\\134c"
        poll = select.poll()
        poll.register(device, select.POLLIN)
        assert poll.poll(10_000)  # the kernel's INIT waits
    finally:
        fuse_mount.unmount(place.mountpoint, lazy=True)
        os.close(device)
