"""The order of the first load of a model, learned and followed, on a real mount in front of a real S3 server."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.support.faulty import FaultyServer
from tests.support.live import spans, status
from tests.support.mounting import RealMount, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, wait_until

pytestmark = needs_fuse

BLOCK = 64 << 10
TENSOR = 16 * BLOCK
TENSORS = 6
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
SIZE = TENSORS * TENSOR
WANTED = ("t1", "t4")
"""Tensors that a sparse reader takes of each shard."""
OPTIONS: dict[str, object] = {
    "block_size": "64KiB",
    "range_size": "256KiB",
    "read_ahead": "64KiB",
    "concurrency": 4,
    "open_wait": 0,
    "metadata_ttl": "1h",
    "passthrough": "off",
}


def tensor(shard: int, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng((shard, int(name[1:]))).integers(0, 256, TENSOR, np.uint8)


@pytest.fixture
def model(s3_bucket: S3Bucket) -> S3Bucket:
    """Three shards of six tensors, their index, a config."""
    weights = {}
    for number, key in enumerate(SHARDS):
        tensors = {f"t{n}": tensor(number, f"t{n}") for n in range(TENSORS)}
        s3_bucket.put(f"m/{key}", save(tensors))
        weights.update({f"{number}.{name}": key for name in tensors})
    s3_bucket.put("m/model.safetensors.index.json", json.dumps({"weight_map": weights}).encode())
    s3_bucket.put("m/config.json", b"{}")
    return s3_bucket


READER = """
import hashlib, sys
from safetensors import safe_open
for path in sys.argv[2:]:
    with safe_open(path, framework="numpy") as file:
        for name in sys.argv[1].split():
            print(hashlib.sha256(file.get_tensor(name)).hexdigest())
"""
"""A rank: a process of its own, for a fault keeps the interpreter's lock, and the proxy is in this one."""


def begin(
    mount: RealMount, names: tuple[str, ...], shards: Sequence[int] = (0, 1, 2)
) -> subprocess.Popen[str]:
    """Read these tensors of each of these shards, in this order."""
    paths = [str(mount.path / "m" / SHARDS[number]) for number in shards]
    argv = [sys.executable, "-c", READER, " ".join(names), *paths]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def end(reader: subprocess.Popen[str], names: tuple[str, ...], shards: Sequence[int] = (0, 1, 2)) -> None:
    """Every byte was right."""
    printed = reader.communicate(timeout=40)[0].split()
    assert printed == [
        hashlib.sha256(tensor(number, name)).hexdigest() for number in shards for name in names
    ]


def load(mount: RealMount, names: tuple[str, ...]) -> None:
    """Read these tensors of all shards, and check them."""
    end(begin(mount, names), names)


def orders(mount: RealMount) -> dict[str, int]:
    return dict(status(mount)["orders"])


@contextlib.contextmanager
def mounted_after(
    model: S3Bucket, faulty: FaultyServer, work: Path, names: tuple[str, ...]
) -> Iterator[RealMount]:
    """A mount with an empty cache, after another one with the same cache directory through which these tensors were
    read: the page cache knows nothing either, and the recording is what is left."""
    env = s3_environment(model.server, faulty.url)
    with mounted(model.url, work, env=env, **OPTIONS) as mount:
        load(mount, names)
    with mounted(model.url, work, env=env, **OPTIONS) as mount:
        evict(mount)
        assert orders(mount)["stored"] == 1
        yield mount


def evict(mount: RealMount) -> None:
    def evicted() -> bool:
        mount.command("evict", str(mount.path), check=False)
        return status(mount)["cache"]["used"] < BLOCK

    wait_until(evicted, "an empty cache", 20)


def fetched(faulty: FaultyServer, since: int) -> list[tuple[int, int, int]]:
    """(shard, start, stop) of the range requests, in order."""
    requests = faulty.seen[since:]
    return [
        (SHARDS.index(request.path.rpartition("/")[2]), *span)
        for request in requests
        if request.path.rpartition("/")[2] in SHARDS
        for span in spans([request], request.path.rpartition("/")[2])
    ]


def test_a_sparse_load_fetches_what_the_first_one_read_and_no_more(
    model: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    with mounted_after(model, faulty_s3, tmp_path, WANTED) as mount:
        before = len(faulty_s3.seen)
        load(mount, WANTED)
        taken = sum(stop - start for _, start, stop in fetched(faulty_s3, before))
        assert taken < 0.5 * 3 * SIZE  # a third is wanted; without a recording it is all
        assert taken >= 3 * len(WANTED) * TENSOR
        found = orders(mount)
        assert (found["stored"], found["replayed"], found["wrong"]) == (1, 1, 0)


def test_a_load_that_reads_other_tensors_gets_them_and_is_recorded_instead(
    model: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    others = ("t0", "t2", "t3", "t5")
    with mounted_after(model, faulty_s3, tmp_path, WANTED) as mount:
        load(mount, others)
        assert orders(mount)["wrong"] >= 1
        wait_until(lambda: orders(mount)["recorded"] == 1, "another recording", 30)
        assert orders(mount)["stored"] == 1


@pytest.mark.expected_log("is passed over: damaged")
def test_a_recording_that_is_damaged_is_passed_over(model: S3Bucket, tmp_path: Path) -> None:
    env = s3_environment(model.server)
    with mounted(model.url, tmp_path, env=env, **OPTIONS) as mount:
        load(mount, WANTED)
    (kept,) = (tmp_path / "cache" / "orders").glob("*.order")  # it was kept at the unmount
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with mounted(model.url, tmp_path, env=env, **OPTIONS) as mount:
        evict(mount)
        load(mount, WANTED)
        assert orders(mount)["replayed"] == 0


def test_with_learning_off_nothing_is_kept(model: S3Bucket, tmp_path: Path) -> None:
    with mounted(model.url, tmp_path, env=s3_environment(model.server), **OPTIONS, learn="off") as mount:
        load(mount, WANTED)
    assert not (tmp_path / "cache" / "orders").exists()


def test_the_config_is_read_and_the_headers_of_all_shards_come_first(
    model: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    with mounted(model.url, tmp_path, env=s3_environment(model.server, faulty_s3.url), **OPTIONS) as mount:
        subprocess.run(["cat", mount.path / "m" / "config.json"], check=True, timeout=20, capture_output=True)
        early = (
            SIZE // (256 << 10) // 2
        )  # requests: while the first shard is not half there, however threads are delayed
        wait_until(lambda: len(fetched(faulty_s3, 0)) >= early, "headers, and what follows", 20)
        first = fetched(faulty_s3, 0)[:early]
        for number in range(3):
            assert next(part for part in first if part[0] == number) == (number, 0, BLOCK)


def test_two_ranks_that_read_the_same_shards_cost_one_download(
    model: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    names = tuple(f"t{number}" for number in range(TENSORS))
    with mounted(model.url, tmp_path, env=s3_environment(model.server, faulty_s3.url), **OPTIONS) as mount:
        ranks = [(begin(mount, names, order), order) for order in ((0, 1, 2), (2, 0, 1))]
        for rank, order in ranks:
            end(rank, names, order)
        seen: dict[int, list[tuple[int, int]]] = {}
        for number, start, stop in fetched(faulty_s3, 0):
            seen.setdefault(number, []).append((start, stop))
        for number, parts in seen.items():
            parts.sort()
            assert all(stop <= after for (_, stop), (after, _) in itertools.pairwise(parts)), number
        assert sorted(seen) == [0, 1, 2]
