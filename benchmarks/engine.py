"""The origin engine alone, as a process of its own: what a cold load costs before any file system.

Reads every object of a bucket's folder in ranges from threads, and throws the bytes away, or writes and hashes
them as the store does, which is the least that a cold load has to do.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from benchmarks.processes import python_module, run
from benchmarks.tools import Bucket

if TYPE_CHECKING:
    from fusecache.origin.interface import Origin
    from fusecache.types import ObjectVersion

BLOCK = 1 << 20


@dataclass(frozen=True)
class Taken:
    """The cost of a load: seconds on the clock, and CPU seconds without the process's start."""

    seconds: float
    cpu: float


def timed_engine(bucket: Bucket, engine: str, concurrency: int, range_mib: int, target: Path | None) -> Taken:
    """The cost of all objects for a fresh process; with `target`, written and hashed there."""
    folder = "" if target is None else str(target)
    arguments = (bucket.url, bucket.endpoint, engine, str(concurrency), str(range_mib), folder)
    printed = json.loads(run(python_module(__name__, *arguments), timeout=900, env=bucket.environment))
    return Taken(float(printed["seconds"]), float(printed["cpu"]))


def main(*arguments: str) -> None:
    """Entry point of the reading process."""
    url, endpoint, engine, concurrency, range_mib, folder = arguments
    print(json.dumps(asdict(read_all(url, endpoint, engine, int(concurrency), int(range_mib) << 20, folder))))


def read_all(url: str, endpoint: str, engine: str, concurrency: int, size: int, folder: str) -> Taken:
    """Read everything in ranges of `size` bytes; raises OSError when bytes are missing."""
    from fusecache.config.model import SourceConfig, Tuning
    from fusecache.origin.factory import open_origin

    source = SourceConfig.model_validate({"url": url, "endpoint_url": endpoint, "engine": engine})
    tuning = Tuning.model_validate({"concurrency": concurrency, "range_size": size})
    origin = open_origin(source, tuning)
    try:
        versions = sorted(origin.list_objects(), key=lambda version: version.key)
        started, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(concurrency) as pool:
            pieces = [
                pool.submit(_read, origin, version, offset, min(size, version.size - offset), folder)
                for version in versions
                for offset in range(0, version.size, size)
            ]
            moved = sum(piece.result() for piece in pieces)
        if moved != sum(version.size for version in versions):
            raise OSError(f"the engine read {moved} bytes")
        return Taken(time.perf_counter() - started, time.process_time() - cpu)
    finally:
        origin.close()


def _read(origin: Origin, version: ObjectVersion, offset: int, length: int, folder: str) -> int:
    if not folder:
        return sum(memoryview(chunk).nbytes for chunk in origin.read_range(version, offset, length))
    descriptor = os.open(
        Path(folder) / version.key.replace("/", "_"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        done = 0
        for chunk in origin.read_range(version, offset, length):
            view = memoryview(chunk).cast("B")
            for start in range(0, view.nbytes, BLOCK):
                xxhash.xxh3_64_intdigest(view[start : start + BLOCK])
            while view:
                written = os.pwrite(descriptor, view, offset + done)
                done += written
                view = view[written:]
        return done
    finally:
        os.close(descriptor)
