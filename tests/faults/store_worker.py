"""The programs that the tests of the store run in other processes: a workload, killed at a chosen call or at any time.

    python -m tests.faults.store_worker crash DIRECTORY VERIFY FIRST STEP LAST
    python -m tests.faults.store_worker churn DIRECTORY LIMIT FLOOR SEED ROUNDS
    python -m tests.faults.store_worker hold DIRECTORY KEY

`crash` forks a process per point: it kills itself at its n-th system call (before it, in the middle of a
write, or after it), and then looks at what it left. `churn` fills and drops objects, one line on stdout per
object. `hold` keeps a descriptor of an object's data file, as a passthrough handle does, until it is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from fusecache.errors import StoreError
from fusecache.store.disk import files
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.object import StoredObject
from fusecache.store.store import Store
from fusecache.types import ObjectVersion

BLOCK = 4096
LIMIT = 24 * BLOCK


def version(key: str, blocks: int = 4, block_size: int = BLOCK) -> ObjectVersion:
    """An object that ends in half a block."""
    return ObjectVersion("mem://b", key, "e", blocks * block_size - block_size // 2, 1)


def content(v: ObjectVersion, block: int, block_size: int = BLOCK) -> bytes:
    """Bytes of one block: a function of version and place, so that nothing can be mixed up."""
    length = min(block_size, v.size - block * block_size)
    seed = xxhash.xxh3_64_intdigest(f"{v.id} {block}".encode())
    return random.Random(seed).randbytes(64) * (length // 64) + bytes(length % 64)


def fetch(stored: StoredObject, blocks: range) -> bool:
    """Fill what is missing of `blocks` as a flight does; False: no room."""
    size = stored.block_size
    with stored.claim_blocks(blocks) as mine:
        for block in mine:
            if stored.is_present(block) or (stored.is_unverified(block) and stored.verify_block(block)):
                continue
            data = content(stored.version, block, size)
            if not stored.reserve_bytes(len(data)):
                return False
            stored.write(block * size, data)
            stored.commit_block(block, xxhash.xxh3_64_intdigest(data))
    return True


def scenario(directory: Path, verify: Any) -> None:
    """Everything that changes files: creation, filling, eviction, pins, a repair, a second start."""
    store = Store(directory, limit=LIMIT, free_floor=0, block_size=BLOCK, verify=verify)
    store.wait_for_scan(30)
    for key in ("a", "b", "c", "d", "e"):
        stored = store.open(version(key))
        fetch(stored, range(2))
        stored.count_access()
        fetch(stored, range(4))
        stored.close()
        if key == "b":
            store.set_pinned(stored.version.id, True)
    store.evict(version("d").id)
    store.close()
    # "boot" is the promise to trust a clean stop
    for path in sorted((directory / "data").rglob("*.data"))[: verify == "start"]:
        with path.open("r+b") as file:
            file.seek(BLOCK + 1)
            file.write(b"damage")
    with Store(directory, limit=LIMIT, free_floor=0, block_size=BLOCK, verify=verify) as again:
        for key in ("a", "b", "c", "e"):
            stored = again.open(version(key))
            fetch(stored, range(4))
            stored.close()


class Killer:
    """Kills the process at the `at`-th call of those that change something."""

    def __init__(self, at: int) -> None:
        self.count = 0
        self._at = at
        self._lock = threading.Lock()
        for module, names in (
            (os, ("open", "pwrite", "rename", "unlink", "ftruncate", "mkdir", "fsync", "close")),
            (fcntl, ("flock", "fcntl")),
        ):
            for name in names:
                setattr(module, name, self._wrap(name, getattr(module, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
                now = self.count == self._at
            if now:
                how = self._at % 3
                with contextlib.suppress(OSError):
                    if how == 1 and name == "pwrite" and len(args[1]) > 1000:
                        real(args[0], bytes(memoryview(args[1]))[: len(args[1]) // 2], args[2])
                    elif how == 2:
                        real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call


def in_child(action: Callable[[], None]) -> int:
    """Run it in a fork; returns the wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def check(directory: Path, verify: Any) -> None:
    """After any crash: right bytes, exact accounting, and a store that goes on."""
    damaged = Store(directory, limit=LIMIT, free_floor=0, block_size=BLOCK, verify=verify)
    with damaged as store:
        assert store.wait_for_scan(30)
        # the process that was killed may have been between counting and marking: never too low
        assert store.usage().used >= disk_usage(directory), "the store holds more than it thinks"
        assert store.usage().used <= LIMIT, "the limit is exceeded"
        for key in ("a", "b", "c", "d", "e"):
            stored = store.open(version(key))
            known = stored.cached_bytes()
            for block in range(4):
                if not stored.is_present(block) and stored.is_unverified(block):
                    stored.verify_block(block)
                if stored.is_present(block):
                    got = os.pread(stored.fileno(), BLOCK, block * BLOCK)
                    assert got == content(stored.version, block), f"wrong bytes in {key} {block}"
            assert known <= stored.version.size
            assert fetch(stored, range(4)), "no room for a small object"
            assert stored.is_complete
            assert os.pread(stored.fileno(), stored.version.size, 0) == b"".join(
                content(stored.version, b) for b in range(4)
            )
            stored.close()
            assert store.usage().used <= LIMIT
        assert store.usage().corrupt_blocks <= 1, "a block was marked before it was written"


def disk_usage(directory: Path) -> int:
    """Bytes that the objects take."""
    return sum(p.stat().st_blocks * 512 for p in (directory / "data").rglob("*") if p.is_file())


def crash(directory: Path, verify: str, first: int, step: int, last: int) -> None:
    """All points from `first` in steps, until a run survives to its end."""
    killed = 0
    for point in range(first, last, step):
        if directory.exists():
            shutil.rmtree(directory)

        def run(at: int = point) -> None:
            Killer(at)
            scenario(directory, verify)

        status = in_child(run)
        if status == 0:
            break
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"the workload failed at point {point}")
        killed += 1
        if in_child(lambda: check(directory, verify)) != 0:
            raise SystemExit(f"point {point}: the store is not what it has to be")
    print(killed)


def churn(directory: Path, limit: int, floor: int, seed: int, rounds: int) -> None:
    """Fill and read objects of a common set, forever short of space."""
    size = 64 << 10
    choose = random.Random(seed)
    with Store(directory, limit=limit, free_floor=floor, block_size=size) as store:
        for _ in range(rounds):
            stored = store.open(version(f"k{choose.randrange(24)}", choose.choice((4, 16)), size))
            try:
                for start in range(0, stored.block_count, 4):
                    fetch(stored, range(start, min(start + 4, stored.block_count)))
            except StoreError as error:
                print(f"error {error}", flush=True)
            for block in range(stored.block_count):
                if stored.is_present(block):
                    got = os.pread(stored.fileno(), size, block * size)
                    assert got == content(stored.version, block, size), "wrong bytes"
            stored.close()
            used = store._ledger.tally().stored
            assert used <= limit, f"{used} bytes stored, {limit} allowed"
            print(used, flush=True)
    print("done", flush=True)


def hold(directory: Path, key: str) -> None:
    """Hold what an object's first four blocks are in."""
    held = files.open_object_files(CacheDirectory(directory), version(key).id, version(key).size, BLOCK)
    print("held" if held else "nothing", flush=True)
    threading.Event().wait()


def main(args: list[str]) -> None:
    """Run the mode that the arguments name; returns the exit status."""
    directory = Path(args[1])
    if args[0] == "crash":
        crash(directory, args[2], *map(int, args[3:6]))
    elif args[0] == "hold":
        hold(directory, args[2])
    else:
        churn(directory, *map(int, args[2:6]))


if __name__ == "__main__":
    main(sys.argv[1:])
