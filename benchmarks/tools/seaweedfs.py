"""A SeaweedFS S3 server on the loopback, with its data wherever the run keeps its own."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import (
    GRPC_OFFSET,
    BenchmarkError,
    answers,
    free_port,
    program,
    run,
    running,
    wait_until,
)
from benchmarks.tools import Bucket

ACCESS_KEY = "benchmark"
SECRET_KEY = "benchmark-secret"  # a throw-away server on the loopback


@contextlib.contextmanager
def s3_server(work: Path, bucket: str) -> Iterator[Bucket]:
    """Serve an empty bucket for the length of the block; its data goes to `work` and is deleted after it."""
    data = work / "seaweedfs"
    data.mkdir(parents=True)
    identity = {
        "name": "benchmark",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = data / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    try:
        with contextlib.ExitStack() as stack:
            # Another program may take a port between the look for a free one and the server's start.
            for last in (False, False, True):
                try:
                    there = stack.enter_context(_server(data, config, work / "seaweedfs.log", bucket))
                    break
                except BenchmarkError:
                    if last:
                        raise
            yield there
    finally:
        shutil.rmtree(data, ignore_errors=True)


@contextlib.contextmanager
def _server(data: Path, config: Path, log: Path, bucket: str) -> Iterator[Bucket]:
    master, volume, filer, s3 = (free_port(with_grpc=True) for _ in range(4))
    command = [
        program("weed"),
        "-logtostderr",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        f"-s3.port={s3}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=4096",
        "-volume.max=100",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    try:
        # It takes its full 10 seconds to end in order, for data that is deleted right after.
        with running(command, log, grace=0.2) as process:
            there = Bucket(f"http://127.0.0.1:{s3}", ACCESS_KEY, SECRET_KEY, bucket, "model", process.pid)

            def ready() -> bool:
                if process.poll() is not None:
                    raise BenchmarkError(f"weed exited: {log.read_text()[-600:]}")
                return answers(s3) and _make_bucket(there)

            wait_until(ready, "the S3 server", 60)
            yield there
    finally:
        # It leaves its sockets in /tmp, whatever TMPDIR says.
        ports = {str(base + offset) for base in (master, volume, filer, s3) for offset in (0, GRPC_OFFSET)}
        for socket in Path("/tmp").glob("seaweedfs-*.sock"):
            if socket.stem.rpartition("-")[2] in ports:
                socket.unlink(missing_ok=True)


def client(bucket: Bucket) -> Any:
    """An s3fs filesystem for it, which unlike s5cmd comes with fusecache."""
    import s3fs

    return s3fs.S3FileSystem(
        key=bucket.access_key,
        secret=bucket.secret_key,
        endpoint_url=bucket.endpoint,
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )


def upload(bucket: Bucket, source: Path) -> None:
    """Put the files of a folder into the bucket's folder."""
    remote = client(bucket)
    for file in sorted(source.iterdir()):
        remote.put_file(str(file), f"{bucket.bucket}/{bucket.prefix}/{file.name}")


def _make_bucket(bucket: Bucket) -> bool:
    # The port answers before the filer behind it does.
    try:
        client(bucket).mkdir(bucket.bucket)
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EINVAL:
            raise BenchmarkError(f"the bucket {bucket.bucket}: {error}") from None
        return False
    return True


def version() -> str:
    """Version of the server, one line."""
    return run([program("weed"), "version"], timeout=30).splitlines()[0].removeprefix("version ")
