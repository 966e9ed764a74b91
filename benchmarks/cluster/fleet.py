"""Processes in the lab: an S3 server behind a limited link, nodes that mount it, and readers that start together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from benchmarks.cluster.lab import Host, Lab
from benchmarks.processes import (
    BenchmarkError,
    mounting,
    program,
    python_module,
    run,
    running,
    unmount,
    wait_until,
)
from benchmarks.tools import Bucket
from benchmarks.tools.fusecache import status
from benchmarks.tools.rclone import OPTIONS as RCLONE_OPTIONS
from benchmarks.tools.seaweedfs import ACCESS_KEY, SECRET_KEY, client

PORT = 7070
_CHUNK = 4 << 20


@contextlib.contextmanager
def origin(lab: Lab, work: Path, bucket: str) -> Iterator[tuple[Host, Bucket]]:
    """An S3 server with an empty bucket on a host of its own, not limited yet."""
    host = lab.host("origin")
    data = work / "seaweedfs"
    data.mkdir(parents=True)
    identity = {
        "name": "benchmark",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = data / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    command = [
        program("weed"),
        "-logtostderr",
        "server",
        f"-dir={data}",
        f"-ip={host.address}",
        f"-ip.bind={host.address}",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        "-s3.port=8333",
        f"-filer.localSocket={data}/filer.sock",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=4096",
        "-volume.max=100",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    log = work / "seaweedfs.log"
    try:
        with running(host.command(command), log, grace=0.2) as process:
            there = Bucket(
                f"http://{host.address}:8333", ACCESS_KEY, SECRET_KEY, bucket, "model", process.pid
            )

            def ready() -> bool:
                if process.poll() is not None:
                    raise BenchmarkError(f"weed exited: {log.read_text()[-600:]}")
                try:
                    client(there).mkdir(bucket)
                except OSError:
                    return False
                return True

            wait_until(ready, "the S3 server", 60)
            yield host, there
    finally:
        shutil.rmtree(data, ignore_errors=True)


@dataclass
class Node:
    """One node with a mount: `folder` is where its files are."""

    host: Host
    work: Path
    mountpoint: Path
    folder: Path
    pid: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where it serves, if it does."""
        return f"http://{self.host.address}:{PORT}"

    def status(self) -> dict[str, Any]:
        """`fusecache status --json`."""
        return status(self.mountpoint)

    def kill(self) -> None:
        """kill -9 of the daemon and its keeper at once, as if the power had failed; and off the network."""
        found = self.status()["process"]
        for pid in (found["keeper_pid"], found["pid"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.host.cut()


class Fleet:
    """Nodes of one kind, in their own folders, mounted at the same time."""

    def __init__(self, hosts: Sequence[Host], bucket: Bucket, work: Path, secret: Path) -> None:
        self._hosts = hosts
        self._bucket = bucket
        self._work = work
        self._secret = secret

    @contextlib.contextmanager
    def fusecache(
        self, *, peers: bool, options: Mapping[str, object], only: Sequence[int] | None = None
    ) -> Iterator[list[Node]]:
        """fusecache mounts with empty caches; `peers`: of one cluster. `only`: these hosts."""
        chosen = [self._hosts[number] for number in (only or range(len(self._hosts)))]
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self._node(host, peers, options)) for host in chosen]

    @contextlib.contextmanager
    def _node(self, host: Host, peers: bool, options: Mapping[str, object]) -> Iterator[Node]:
        work = self._work / host.name
        mountpoint = work / "mnt"
        mountpoint.mkdir(parents=True, exist_ok=True)
        given: dict[str, object] = {
            "endpoint_url": self._bucket.endpoint,
            "cache_dir": work / "cache",
            **options,
        }
        if peers:
            given |= {
                "peers.discovery": "static",
                "peers.members": ";".join(f"http://{other.address}:{PORT}" for other in self._hosts),
                "peers.listen": f"{host.address}:{PORT}",
                "peers.node": host.name,
                "peers.secret_file": self._secret,
            }
        words = ",".join(f"{key}={value}" for key, value in given.items())
        command = [program("fusecache"), "mount", self._bucket.url, str(mountpoint), "-o", words]
        try:
            run(host.command(command), timeout=60, env=self._bucket.environment)
            yield Node(host, work, mountpoint, mountpoint)
        finally:
            with contextlib.suppress(BenchmarkError):
                run([program("fusecache"), "umount", "--lazy", str(mountpoint)], timeout=60)
            unmount(mountpoint)
            shutil.rmtree(work, ignore_errors=True)

    @contextlib.contextmanager
    def rclone(self) -> Iterator[list[Node]]:
        """rclone mounts with empty caches: each reads the origin itself."""
        with contextlib.ExitStack() as stack:
            nodes = []
            for host in self._hosts:
                work = self._work / host.name
                work.mkdir(parents=True)
                stack.callback(shutil.rmtree, work, ignore_errors=True)
                (work / "rclone.conf").touch()
                bucket = self._bucket
                command = [
                    program("rclone"),
                    "mount",
                    f":s3:{bucket.bucket}/{bucket.prefix}",
                    str(work / "mnt"),
                    f"--config={work / 'rclone.conf'}",
                    f"--cache-dir={work / 'cache'}",
                    *RCLONE_OPTIONS,
                ]
                env = {
                    **bucket.environment,
                    "RCLONE_S3_PROVIDER": "SeaweedFS",
                    "RCLONE_S3_ENV_AUTH": "true",
                    "RCLONE_S3_ENDPOINT": bucket.endpoint,
                }
                stack.enter_context(mounting(host.command(command), work / "mnt", work / "rclone.log", env))
                nodes.append(Node(host, work, work / "mnt", work / "mnt"))
            yield nodes

    @contextlib.contextmanager
    def juicefs(self, meta: Path) -> Iterator[list[Node]]:
        """JuiceFS mounts with empty caches, each with a copy of the metadata: the community edition's nodes share no
        cache."""
        with contextlib.ExitStack() as stack:
            nodes = []
            for host in self._hosts:
                work = self._work / host.name
                work.mkdir(parents=True)
                stack.callback(shutil.rmtree, work, ignore_errors=True)
                _copy_database(meta, work / "meta.db")
                command = [
                    program("juicefs"),
                    "mount",
                    f"sqlite3://{work / 'meta.db'}",
                    str(work / "mnt"),
                    f"--cache-dir={work / 'cache'}",
                    "--buffer-size=300M",
                    "--max-readahead=256",
                    "--prefetch=8",
                    "--cache-size=100G",
                    "--free-space-ratio=0.01",
                    "--verify-cache-checksum=none",
                    "--open-cache=1h",
                    "--attr-cache=1h",
                    "--entry-cache=1h",
                    "--dir-entry-cache=1h",
                    "--read-only",
                    "--no-bgjob",
                    "--backup-meta=0",
                    "--no-usage-report",
                    "--no-syslog",
                ]
                stack.enter_context(mounting(host.command(command), work / "mnt", work / "juicefs.log"))
                nodes.append(Node(host, work, work / "mnt", work / "mnt" / self._bucket.prefix))
            yield nodes


def _copy_database(source: Path, target: Path) -> None:
    """With what is only in its write-ahead log yet."""
    with (
        contextlib.closing(sqlite3.connect(source)) as found,
        contextlib.closing(sqlite3.connect(target)) as made,
    ):
        found.backup(made)


def wait_joined(nodes: Sequence[Node]) -> None:
    """Until every node sees all of them."""

    def joined() -> bool:
        return all(node.status()["peers"]["nodes"] == len(nodes) for node in nodes)

    wait_until(joined, "the nodes see each other", 60)


@dataclass
class Reading:
    """The outcome of one run: seconds from the common start to each one's end, None for those killed."""

    seconds: dict[str, float | None]
    origin_bytes: int
    busy: float
    """Share of the CPUs' time that was not idle."""

    @property
    def last(self) -> float:
        """Seconds until the last that was not killed had everything."""
        return max(taken for taken in self.seconds.values() if taken is not None)


def read_together(
    nodes: Sequence[Node],
    files: Sequence[str],
    digests: Mapping[str, str],
    source: Host,
    *,
    timeout: float,
    readers: int = 1,
    during: Callable[[float], set[str]] = lambda _began: set(),
) -> Reading:
    """Let `readers` processes per node read all files at the same moment and compare their digests. `during` is called
    once they run, with the time they began, and returns the names of nodes whose readers don't count."""
    children: list[tuple[str, subprocess.Popen[str]]] = []
    try:
        for node in nodes:
            for number in range(readers):
                turn = number % len(files)
                order = [*files[turn:], *files[:turn]]
                paths = [str(node.folder / name) for name in order]
                children.append((node.host.name, _reader(paths)))
        for _, child in children:
            assert child.stdout is not None
            child.stdout.readline()
        sent, cpu = source.sent(), _cpu()
        began = time.monotonic()
        for _, child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        lost = during(began)
        seconds: dict[str, float | None] = dict.fromkeys(lost)
        for name, child in children:
            if name in lost:
                continue
            try:
                printed, _ = child.communicate(timeout=max(1.0, timeout - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                raise BenchmarkError(f"node {name}: not all bytes within {timeout:g} s") from None
            if child.returncode != 0:
                raise BenchmarkError(f"node {name}: the reader failed: {printed.strip()[-300:]}")
            found = json.loads(printed)
            wrong = [key for key, digest in found["digests"].items() if digests[key] != digest]
            if wrong:
                raise BenchmarkError(f"node {name} read wrong bytes of {', '.join(wrong)}")
            seconds[name] = max(seconds.get(name) or 0.0, found["end"] - began)
        idle = (_cpu()[0] - cpu[0]) / max(1e-9, _cpu()[1] - cpu[1])
        return Reading(seconds, source.sent() - sent, 1 - idle)
    finally:
        for _, child in children:
            child.kill()
        for _, child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)


def _reader(paths: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        python_module("benchmarks.cluster.fleet", *paths),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _cpu() -> tuple[int, int]:
    """(idle, all) ticks of all CPUs."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def digest_of(path: str | Path) -> str:
    """xxh3_128 of a file, read in 4 MiB reads."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def main(*paths: str) -> None:
    """Entry point of a reading process: waits for a line, reads, prints what it found."""
    print("ready", flush=True)
    sys.stdin.readline()
    digests = {Path(path).name: digest_of(path) for path in paths}
    print(json.dumps({"end": time.monotonic(), "digests": digests}))
