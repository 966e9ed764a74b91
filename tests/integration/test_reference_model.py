"""A real mount against a model of it in memory: random reads, mappings, overwrites, deletions, evictions, remounts.

The model is small: objects have a version, and a handle has the version that was current when it was opened. A
read of a handle gives the bytes of its version; only when that was replaced or deleted may it fail instead, and
with ESTALE alone. A path always leads to the current version. Content is a function of name and version.

`./scripts/test --soak MINUTES` runs it that long with new seeds, and kills the daemon among the operations; a failure
names its seed, and `./scripts/test --soak 0 --seed N` runs that one again. Otherwise the examples are always the same.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import mmap
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fusecache.errors import ControlError
from tests.support.content import check, content
from tests.support.live import HANG, asked, in_time, kill_daemon
from tests.support.mounting import RealMount, failing, mounted, needs_fuse
from tests.support.servers import wait_until

pytestmark = needs_fuse

_BLOCK = 64 << 10
_NAMES = ("a.dat", "b.safetensors", "sub/c.bin", "sub/d.dat")
_SIZES = (0, 1, 4095, _BLOCK, _BLOCK + 1, 5 * _BLOCK - 3, 777_777)
_MOST_OPEN = 6
_MAX_KILLS_PER_MINUTE = 4
"""The keeper gives up after five ends of its daemon within a minute."""
_SOAK_MINUTES = os.environ.get("FUSECACHE_TEST_SOAK")
_SEED = os.environ.get("FUSECACHE_TEST_SEED")


class StaleError(Exception):
    """A read failed with ESTALE."""


class World:
    """An origin directory and its mount, for all examples: each has a directory of its own."""

    def __init__(self, work: Path, **options: object) -> None:
        self.work = work
        self.origin = work / "origin"
        self.origin.mkdir()
        self.examples = itertools.count()
        self.versions = itertools.count(1)
        self.kills_daemon = False
        self._killed_at: list[float] = []
        self._options = options
        self._stack = ExitStack()
        self.mount: RealMount
        (self.origin / "anchor").write_bytes(b"")
        self.remount()

    def remount(self) -> None:
        self.close()
        options = {"metadata_ttl": 0, "negative_ttl": 0, "block_size": _BLOCK, "cache_size": "32MiB"}
        self.mount = self._stack.enter_context(
            mounted(f"file://{self.origin}", self.work, **(options | self._options))
        )

    def close(self) -> None:
        self._stack.close()

    def kill(self) -> None:
        """kill -9 of the daemon, if the keeper starts one more within this minute; returns when the next serves."""
        self._killed_at = [at for at in self._killed_at if time.monotonic() - at < 60]
        if len(self._killed_at) < _MAX_KILLS_PER_MINUTE:
            self._killed_at.append(time.monotonic())
            kill_daemon(self.mount)
            wait_until(self._is_served, "the next daemon serves", HANG)

    def _is_served(self) -> bool:
        try:
            asked(self.mount, "status")
        except ControlError:
            return False
        return True

    def put(self, key: str, version: int, size: int) -> None:
        """Replace the object at once, as an object store does."""
        path = self.origin / key
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.work / "fresh"
        fresh.write_bytes(content(key, version, 0, size))
        os.replace(fresh, path)


@dataclass
class Handle:
    """A descriptor and mappings of one version."""

    key: str
    version: int
    size: int
    fd: int
    number: int
    maps: list[tuple[mmap.mmap, dict[int, int]]] = field(default_factory=list)
    """Mappings, with the bytes that were written into the private ones."""

    def close(self) -> None:
        for mapping, _ in self.maps:
            mapping.close()
        os.close(self.fd)


class Machine(RuleBasedStateMachine):
    """One example: a folder of objects, the handles that are open in it, and what each of them has to hold."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.folder = f"example-{next(world.examples)}"
        self.objects: dict[str, tuple[int, int]] = {}
        """Key -> current version and size."""
        self.numbers: dict[tuple[str, int], int] = {}
        self.handles: list[Handle] = []

    def key(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def path(self, key: str) -> Path:
        return self.world.mount.path / key

    def is_current(self, handle: Handle) -> bool:
        return self.objects.get(handle.key) == (handle.version, handle.size)

    # -- the origin

    @rule(name=st.sampled_from(_NAMES), size=st.sampled_from(_SIZES))
    def put(self, name: str, size: int) -> None:
        key, version = self.key(name), next(self.world.versions)
        self.world.put(key, version, size)
        self.objects[key] = (version, size)

    @rule(name=st.sampled_from(_NAMES))
    def delete(self, name: str) -> None:
        key = self.key(name)
        (self.world.origin / key).unlink(missing_ok=True)
        self.objects.pop(key, None)

    # -- readers

    @precondition(lambda self: len(self.handles) < _MOST_OPEN)
    @rule(name=st.sampled_from(_NAMES), flags=st.sampled_from((0, os.O_NONBLOCK)))
    def open(self, name: str, flags: int) -> None:
        key = self.key(name)
        found = self.objects.get(key)
        if found is None:
            assert failing(lambda: os.open(self.path(key), os.O_RDONLY | flags)) == "ENOENT"
            return
        fd = os.open(self.path(key), os.O_RDONLY | flags)
        about = os.fstat(fd)
        self.handles.append(Handle(key, *found, fd, about.st_ino))
        assert about.st_size == found[1]
        assert self.numbers.setdefault((key, found[0]), about.st_ino) == about.st_ino

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, _MOST_OPEN), data=st.data(), drop=st.booleans())
    def read(self, which: int, data: st.DataObject, drop: bool) -> None:
        handle = self.handles[which % len(self.handles)]
        offset = data.draw(st.integers(0, handle.size + 10))
        length = data.draw(st.sampled_from((1, 4096, _BLOCK, 3 * _BLOCK, 1 << 20)))
        if drop:
            os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with contextlib.nullcontext() if self.is_current(handle) else contextlib.suppress(StaleError):
            self.reads_right(handle, length, offset)

    def reads_right(self, handle: Handle, length: int, offset: int) -> None:
        try:
            got = in_time(functools.partial(os.pread, handle.fd, length, offset))
        except OSError as error:
            raise (StaleError if error.errno == errno.ESTALE else AssertionError)(handle.key) from error
        assert len(got) == max(0, min(length, handle.size - offset))
        check(got, handle.key, handle.version, offset)

    @rule(name=st.sampled_from(_NAMES))
    def read_all(self, name: str) -> None:
        key = self.key(name)
        if key not in self.objects:
            assert failing(lambda: self.path(key).read_bytes()) == "ENOENT"
            return
        version, size = self.objects[key]
        got = in_time(self.path(key).read_bytes)
        assert len(got) == size
        check(got, key, version)

    @precondition(lambda self: any(handle.size and self.is_current(handle) for handle in self.handles))
    @rule(which=st.integers(0, _MOST_OPEN), private=st.booleans())
    def map(self, which: int, private: bool) -> None:
        able = [handle for handle in self.handles if handle.size and self.is_current(handle)]
        handle = able[which % len(able)]
        flags, protection = mmap.MAP_SHARED, mmap.PROT_READ
        if private:
            flags, protection = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        handle.maps.append((mmap.mmap(handle.fd, handle.size, flags, protection), {}))
        written = handle.maps[-1][1]
        if private:
            written[handle.size // 2] = 0x5A
            handle.maps[-1][0][handle.size // 2] = 0x5A
        self.look(which)

    @precondition(lambda self: any(handle.maps for handle in self.handles))
    @rule(which=st.integers(0, _MOST_OPEN))
    def look(self, which: int) -> None:
        """Read the mappings of a handle; a version that is gone would be SIGBUS, for the tests too."""
        able = [handle for handle in self.handles if handle.maps and self.is_current(handle)]
        for handle in able[which % len(able) :][:1] if able else ():
            for mapping, written in handle.maps:
                wanted = bytearray(content(handle.key, handle.version, 0, handle.size))
                for at, value in written.items():
                    wanted[at] = value
                assert mapping[:] == wanted

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, _MOST_OPEN))
    def close(self, which: int) -> None:
        self.handles.pop(which % len(self.handles)).close()

    # -- the cache

    @rule(name=st.sampled_from(_NAMES))
    def evict(self, name: str) -> None:
        with contextlib.suppress(ControlError):  # it is in use, or not there
            asked(self.world.mount, "evict", path=self.key(name))

    @rule()
    def evict_all(self) -> None:
        asked(self.world.mount, "evict", all=True)

    @rule(sure=st.integers(0, 9))
    def remount(self, sure: int) -> None:
        if sure != 7:  # it takes a second or two
            return
        self.forget()
        self.world.remount()

    @precondition(lambda self: self.world.kills_daemon)
    @rule(sure=st.integers(0, 4))
    def kill_the_daemon(self, sure: int) -> None:
        if sure == 3:
            self.world.kill()

    def forget(self) -> None:
        while self.handles:
            self.handles.pop().close()

    # -- after each step

    @invariant()
    def the_tree_is_that_of_the_origin(self) -> None:
        found: dict[str, tuple[int, int]] = {}
        for folder in (self.folder, f"{self.folder}/sub"):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    if entry.is_file():
                        about = self.path(f"{folder}/{entry.name}").stat()
                        found[f"{folder}/{entry.name}"] = (about.st_size, about.st_ino)
        assert {key: size for key, (size, _) in found.items()} == {
            key: size for key, (_, size) in self.objects.items()
        }
        for key, (_, number) in found.items():
            assert self.numbers.setdefault((key, self.objects[key][0]), number) == number

    @invariant()
    def handles_stay_what_they_were(self) -> None:
        for handle in self.handles:
            about = os.fstat(handle.fd)
            assert (about.st_size, about.st_ino) == (handle.size, handle.number)

    def teardown(self) -> None:
        self.forget()


@pytest.fixture(scope="module", params=["auto", "off"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With everything on, and with nothing fetched but what is asked for."""
    made = World(tmp_path_factory.mktemp(f"model-{request.param}"), prefetch=request.param)
    yield made
    made.close()


_SETTINGS = settings(
    max_examples=13,
    stateful_step_count=15,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.skipif(_SOAK_MINUTES is not None, reason="the soak runs instead")
def test_a_mount_does_what_its_model_does(world: World) -> None:
    run_state_machine_as_test(lambda: Machine(world), settings=_SETTINGS)


@pytest.mark.skipif(_SOAK_MINUTES is None, reason="./scripts/test --soak MINUTES runs it")
@pytest.mark.timeout(0)
@pytest.mark.expected_log("daemon")  # it was killed
def test_a_mount_does_what_its_model_does_for_a_long_time(world: World) -> None:
    """Half of the time with each kind of mount."""
    world.kills_daemon = True
    until = time.monotonic() + 60 * float(_SOAK_MINUTES or 0) / 2
    seeds = random.SystemRandom()
    while True:
        number = seeds.getrandbits(32) if _SEED is None else int(_SEED)
        print(f"seed {number}", flush=True)
        try:
            run_state_machine_as_test(
                seed(number)(lambda: Machine(world)),
                settings=settings(_SETTINGS, derandomize=False, max_examples=5, stateful_step_count=40),
            )
        except BaseException as error:
            error.add_note(f"again: ./scripts/test --soak 0 --seed {number}")
            raise
        if _SEED is not None or time.monotonic() >= until:
            return
