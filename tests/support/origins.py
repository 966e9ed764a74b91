"""Every kind of origin with something in it, for the contract suite."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from fusecache.config.model import SourceConfig, Tuning
from fusecache.origin.factory import open_origin
from fusecache.origin.interface import Origin
from tests.support.servers import GcsBucket, S3Bucket

QUICK = Tuning(
    deadline=6, connect_timeout=2, stall_timeout=2, retry_initial=0.001, retry_max=0.01, concurrency=8
)
"""Short pauses and deadlines, for tests; long enough that a busy machine is not taken for a stall, and asked again."""

_numbers = itertools.count(1)


@dataclass
class Place:
    """An origin and the way to change what is behind its back; keys are relative to its prefix."""

    origin: Origin
    put: Callable[[str, bytes], object]
    delete: Callable[[str], object]


def read(origin: Origin, version: Any, offset: int = 0, length: int | None = None, **more: Any) -> bytes:
    """The bytes of a range, or of all of it, each chunk copied before the next is asked for."""
    length = version.size - offset if length is None else length
    return b"".join(bytes(chunk) for chunk in origin.read_range(version, offset, length, **more))


@contextlib.contextmanager
def opened(config: SourceConfig, tuning: Tuning = QUICK) -> Iterator[Origin]:
    """An origin for the length of the block."""
    origin = open_origin(config, tuning)
    try:
        yield origin
    finally:
        origin.close()


def s3_config(bucket: S3Bucket, prefix: str = "", **more: Any) -> SourceConfig:
    """The source of a bucket, with its keys, past the environment."""
    values: dict[str, Any] = {
        "url": bucket.url + (f"/{prefix}" if prefix else ""),
        "endpoint_url": bucket.server.endpoint,
        "region": bucket.server.region,
        "access_key_id": bucket.server.access_key,
        "secret_access_key": bucket.server.secret_key,
    }
    return SourceConfig.model_validate({**values, **more})


@contextlib.contextmanager
def s3_place(bucket: S3Bucket, engine: str) -> Iterator[Place]:
    """A prefix of a bucket."""
    prefix = f"some/prefix {next(_numbers)}"
    with opened(s3_config(bucket, prefix, engine=engine)) as origin:
        yield Place(
            origin,
            lambda key, data: bucket.put(f"{prefix}/{key}", data),
            lambda key: bucket.delete(f"{prefix}/{key}"),
        )


@contextlib.contextmanager
def gcs_place(bucket: GcsBucket, engine: str) -> Iterator[Place]:
    """A prefix of a bucket of the emulator."""
    config = SourceConfig.model_validate(
        {"url": bucket.url + "/some/prefix", "endpoint_url": bucket.server.endpoint, "engine": engine}
    )
    with opened(config) as origin:
        yield Place(
            origin,
            lambda key, data: bucket.put(f"some/prefix/{key}", data),
            lambda key: bucket.delete(f"some/prefix/{key}"),
        )


@contextlib.contextmanager
def file_place(root: Path) -> Iterator[Place]:
    """A directory."""

    def put(key: str, data: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("new~").write_bytes(data)
        path.with_name("new~").rename(path)

    root.mkdir()
    with opened(SourceConfig(url=f"file://{root}")) as origin:
        yield Place(origin, put, lambda key: os.unlink(root / key))


@contextlib.contextmanager
def memory_place() -> Iterator[Place]:
    """A directory of fsspec's memory file system, which is one for the whole process."""
    root = f"/place-{next(_numbers)}"
    filesystem = fsspec.filesystem("memory")
    filesystem.mkdir(root)
    with opened(SourceConfig(url=f"memory:/{root}")) as origin:
        yield Place(
            origin,
            lambda key, data: filesystem.pipe_file(f"{root}/{key}", data),
            lambda key: filesystem.rm_file(f"{root}/{key}"),
        )
    filesystem.rm(root, recursive=True)


@contextlib.contextmanager
def http_place(url: str, objects: dict[str, bytes]) -> Iterator[Place]:
    """A folder of the faulty server."""
    objects["some/.keep"] = b""
    with opened(SourceConfig(url=f"{url}/some")) as origin:
        yield Place(
            origin,
            lambda key, data: objects.__setitem__(f"some/{key}", data),
            lambda key: objects.pop(f"some/{key}"),
        )
