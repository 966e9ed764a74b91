"""The programs whose time is taken: each reads files in one way and prints its seconds as JSON.

They run as processes of their own, so that a mount that hangs is a reader that is killed at a deadline, and
that no state is shared between contestants. The clock starts when the imports are done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.processes import BenchmarkError, program, python_module, run

CHUNK = 4 << 20
READ_TIMEOUT = 900.0


def read_through(path: str) -> int:
    """Read a file from the start to the end in 4 MiB reads into one buffer; returns its bytes."""
    buffer = bytearray(CHUNK)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        total = 0
        while count := os.readv(descriptor, [buffer]):
            total += count
        return total
    finally:
        os.close(descriptor)


def sequential(files: Sequence[str]) -> int:
    """One file after the other."""
    return sum(read_through(file) for file in files)


def parallel(files: Sequence[str]) -> int:
    """All files at once, a process each."""
    return _in_processes([[file] for file in files])


def crowd(files: Sequence[str]) -> int:
    """8 processes that each read all files, as the ranks of one engine do."""
    return _in_processes([list(files)] * 8)


def safetensors(files: Sequence[str]) -> int:
    """Every tensor through `safe_open`, copied out as a loader does; returns the bytes of the tensors."""
    from safetensors import safe_open

    total = 0
    for file in files:
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                total += handle.get_tensor(name).nbytes
    return total


MODES: dict[str, Callable[[Sequence[str]], int]] = {
    "sequential": sequential,
    "parallel": parallel,
    "crowd": crowd,
    "safetensors": safetensors,
}


def timed(mode: str, files: Sequence[Path], timeout: float = READ_TIMEOUT) -> float:
    """Seconds that a fresh process takes to read the files; raises BenchmarkError when bytes are missing."""
    printed = json.loads(run(python_module(__name__, mode, *map(str, files)), timeout=timeout))
    if mode in ("sequential", "parallel") and printed["bytes"] != sum(file.stat().st_size for file in files):
        raise BenchmarkError(f"{mode} read {printed['bytes']} bytes of {files[0].parent}: not all")
    return float(printed["seconds"])


def random_reads(files: Sequence[Path], count: int, timeout: float = READ_TIMEOUT) -> float:
    """Seconds for `count` 4 KiB preads at random aligned offsets of the files, by fio (a compiled reader)."""
    names = ":".join(str(file).replace(":", "\\:") for file in files)
    command = [
        program("fio"),
        "--name=random",
        f"--filename={names}",
        "--readonly",
        "--rw=randread",
        "--bs=4k",
        "--ioengine=psync",
        "--direct=0",
        "--norandommap",
        "--file_service_type=random",
        "--invalidate=0",
        "--randseed=7",
        f"--number_ios={count}",
        f"--io_size={count * 4096}",
        "--output-format=json",
    ]
    job = json.loads(run(command, timeout=timeout))["jobs"][0]
    if job["read"]["total_ios"] < count:
        raise BenchmarkError(f"fio made {job['read']['total_ios']} of {count} reads")
    return (
        float(job["read"]["runtime"]) / 1000
        if not job["read"]["iops"]
        else count / float(job["read"]["iops"])
    )


def _in_processes(groups: Sequence[Sequence[str]]) -> int:
    # Children wait for a line, so that none reads while another one still starts.
    children = [
        subprocess.Popen(
            python_module(__name__, "child", *group), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for group in groups
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        global _started
        _started = time.perf_counter()
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
        return sum(int(child.communicate()[0]) for child in children)
    finally:
        for child in children:
            child.kill()
            child.wait()


_started = 0.0


def main(mode: str, *files: str) -> None:
    """Entry point of the reading process."""
    global _started
    if mode == "child":
        print("ready", flush=True)
        sys.stdin.readline()
        print(sequential(files))
        return
    if mode == "safetensors":
        import numpy  # noqa: F401
        import safetensors as _  # noqa: F401
    _started = time.perf_counter()
    total = MODES[mode](files)
    print(json.dumps({"seconds": time.perf_counter() - _started, "bytes": total}))
