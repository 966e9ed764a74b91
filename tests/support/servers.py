"""Real storage servers on free ports of the loopback, killed with their process group at the end.

`seaweedfs` and `moto` speak S3 and give an `S3Server`, `gcs_emulator` gives a `GcsServer`. Both make buckets,
and a `Bucket` puts, gets and deletes objects past the code under test: plain botocore, or plain HTTP.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import botocore.config
import botocore.exceptions
import botocore.session

_START_DEADLINE = 60.0
_POLL = threading.Event()  # never set
_GRPC_OFFSET = 10000  # SeaweedFS listens there, too
_names = itertools.count(1)


class Bucket(Protocol):
    """One bucket of one server, as a test sees it."""

    @property
    def url(self) -> str:
        """Its URL, without a slash at the end: s3://name."""
        ...

    def put(self, key: str, data: bytes) -> str:
        """Create or overwrite; returns the new version (ETag or generation)."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object."""
        ...

    def delete(self, key: str) -> None:
        """Delete one object."""
        ...


@dataclass(frozen=True)
class S3Server:
    """A running S3 server and the credentials that it takes."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def client(self) -> Any:
        """A botocore client with these credentials, one per server; thread-safe."""
        return _client(self)

    def bucket(self, name: str | None = None) -> S3Bucket:
        """Make an empty bucket; without a name, a new one."""
        name = name or f"test-{os.getpid()}-{next(_names)}"
        client = self.client()
        client.create_bucket(Bucket=name)
        return S3Bucket(self, name, client)


@functools.cache
def _client(server: S3Server) -> Any:
    session = botocore.session.Session()
    session.set_credentials(server.access_key, server.secret_key)
    return session.create_client(
        "s3",
        region_name=server.region,
        endpoint_url=server.endpoint,
        config=botocore.config.Config(
            s3={"addressing_style": "path"}, retries={"max_attempts": 3}, max_pool_connections=50, proxies={}
        ),
    )


@dataclass(frozen=True)
class S3Bucket:
    """One bucket of an S3 server."""

    server: S3Server
    name: str
    client: Any

    @property
    def url(self) -> str:
        """s3://name."""
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes, **more: Any) -> str:
        """Create or overwrite an object; returns its ETag. `more` goes to put_object as it is."""
        return str(self.client.put_object(Bucket=self.name, Key=key, Body=data, **more)["ETag"])

    def put_multipart(self, key: str, parts: Sequence[bytes]) -> str:
        """Upload in parts (5 MiB at least but for the last); returns the multipart ETag."""
        at = {"Bucket": self.name, "Key": key}
        upload = self.client.create_multipart_upload(**at)["UploadId"]
        done = [
            {
                "PartNumber": number,
                "ETag": self.client.upload_part(**at, UploadId=upload, PartNumber=number, Body=part)["ETag"],
            }
            for number, part in enumerate(parts, 1)
        ]
        answer = self.client.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": done})
        return str(answer["ETag"])

    def get(self, key: str) -> bytes:
        """The whole object."""
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.client.delete_object(Bucket=self.name, Key=key)

    def keys(self) -> list[str]:
        """Every key, in the server's order."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


@dataclass(frozen=True)
class GcsServer:
    """A running emulator of Google Cloud Storage; `endpoint` is what STORAGE_EMULATOR_HOST wants."""

    endpoint: str

    def bucket(self, name: str | None = None) -> GcsBucket:
        """Make an empty bucket; without a name, a new one."""
        name = name or f"test-{os.getpid()}-{next(_names)}"
        body = json.dumps({"name": name}).encode()
        _request(
            f"{self.endpoint}/storage/v1/b?project=test", "POST", body, {"Content-Type": "application/json"}
        )
        return GcsBucket(self, name)


@dataclass(frozen=True)
class GcsBucket:
    """One bucket of the emulator."""

    server: GcsServer
    name: str

    @property
    def url(self) -> str:
        """gs://name."""
        return f"gs://{self.name}"

    def _object(self, key: str) -> str:
        return f"{self.server.endpoint}/storage/v1/b/{self.name}/o/{urllib.parse.quote(key, safe='')}"

    def put(self, key: str, data: bytes, metadata: Mapping[str, str] | None = None) -> str:
        """Create or overwrite an object; returns its generation."""
        # Not uploadType=media: with that one the emulator takes no empty objects.
        name = json.dumps({"name": key, **({"metadata": metadata} if metadata else {})}).encode()
        body = b"".join(
            (
                b"--part\r\nContent-Type: application/json\r\n\r\n" + name,
                b"\r\n--part\r\nContent-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--part--",
            )
        )
        answer = _request(
            f"{self.server.endpoint}/upload/storage/v1/b/{self.name}/o?uploadType=multipart",
            "POST",
            body,
            {"Content-Type": "multipart/related; boundary=part"},
        )
        return str(json.loads(answer)["generation"])

    def get(self, key: str) -> bytes:
        """The whole object."""
        return _request(self._object(key) + "?alt=media", "GET", None, {})

    def delete(self, key: str) -> None:
        """Delete an object."""
        _request(self._object(key), "DELETE", None, {})


def _request(url: str, method: str, body: bytes | None, headers: dict[str, str]) -> bytes:
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        return bytes(answer.read())


def free_port(*, with_grpc: bool = False) -> int:
    """A TCP port of the loopback that is free now; `with_grpc`: so is the one 10000 above it."""
    for _ in range(200):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if not with_grpc:
                return port
            if port + _GRPC_OFFSET > 65535:
                port = 10000 + port % 15000  # ephemeral ports are mostly above: look below them
            try:
                for number in {port, port + _GRPC_OFFSET} - {int(first.getsockname()[1])}:
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise AssertionError("no free TCP port on the loopback")


def program(name: str) -> str:
    """Path of a program: of this Python environment first, then of PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    assert found, f"{name} is not installed: run scripts/setup test"
    return found


def wait_until(done: Callable[[], bool], what: str, deadline: float = _START_DEADLINE) -> None:
    """Poll `done`; fails with the name of what did not come."""
    for _ in range(int(deadline / 0.02)):
        if done():
            return
        _POLL.wait(0.02)
    raise AssertionError(f"{what}: not within {deadline:g} s")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the length of the block, its output in `log`; it dies with this process, too."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield process
    finally:
        # Its data is thrown away: no reason to let it end in its own time.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _await_server(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool], what: str) -> None:
    def check() -> bool:
        assert process.poll() is None, f"{what} exited: {log.read_text(errors='replace')[-800:]}"
        return ready()

    wait_until(check, what)


@contextlib.contextmanager
def seaweedfs(work: Path) -> Iterator[S3Server]:
    """SeaweedFS's S3 server, with its data in `work`; it refuses every key but one (403)."""
    data = work / "seaweedfs"
    data.mkdir(parents=True)
    access, secret = "seaweed-access", "seaweed-secret-1f0c7d"
    identity = {
        "name": "test",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = work / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
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
        f"-filer.localSocket={work}/filer.sock",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=2000",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    server = S3Server("seaweedfs", f"http://127.0.0.1:{s3}", access, secret)
    log = work / "seaweedfs.log"
    probe = server.client()

    def ready() -> bool:
        # A write needs the master, a volume and the filer, and that is what the tests begin with.
        try:
            probe.create_bucket(Bucket="ready")
            probe.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False
        return True

    try:
        # One volume for each new bucket instead of seven: less to create, and no end of them.
        with running(command, log, {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}) as process:
            _await_server(process, log, lambda: _listens(s3) and ready(), "SeaweedFS")
            yield server
    finally:
        shutil.rmtree(data, ignore_errors=True)
        # It leaves its sockets in /tmp, whatever TMPDIR says.
        ports = {str(base + plus) for base in (master, volume, filer, s3) for plus in (0, _GRPC_OFFSET)}
        for path in Path("/tmp").glob("seaweedfs-*.sock"):
            if path.stem.rpartition("-")[2] in ports:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def moto(work: Path) -> Iterator[S3Server]:
    """moto's S3 server: everything in memory, any credentials do."""
    port = free_port()
    server = S3Server("moto", f"http://127.0.0.1:{port}", "moto-access", "moto-secret-93ab2e")
    log = work / "moto.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, log) as process:
        _await_server(process, log, lambda: _listens(port), "moto")
        yield server


@contextlib.contextmanager
def gcs_emulator(work: Path) -> Iterator[GcsServer]:
    """gcp-storage-emulator, everything in memory, no credentials."""
    port = free_port()
    log = work / "gcs.log"
    command = [
        program("gcp-storage-emulator"),
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
    ]
    with running(command, log) as process:
        _await_server(process, log, lambda: _listens(port), "gcp-storage-emulator")
        yield GcsServer(f"http://127.0.0.1:{port}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
