"""The measurements of the cluster benchmark."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cluster.fleet import Fleet, Node, Reading, digest_of, origin, read_together, wait_joined
from benchmarks.cluster.lab import Host, Lab
from benchmarks.processes import mounting, pause, program, run
from benchmarks.tools import Bucket
from benchmarks.tools.s5cmd import S5cmd
from benchmarks.tools.seaweedfs import upload

CONTENDERS = ("fusecache", "plain", "rclone", "juicefs")


@dataclass
class Plan:
    """The parameters of a run. `rate` in bytes per second of each link and the origin; `stripe` and
    `block` in bytes: of a model
    that is small, so that each node has as many stripes of it as it would have of a large one."""

    rate: float
    size: int
    shards: int = 4
    stripe: int = 2 << 20
    block: int = 256 << 10
    timeout: float = 300.0
    options: dict[str, object] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """Seconds that the model takes through one link."""
        return self.size / self.rate

    def mount_options(self, peers: bool) -> dict[str, object]:
        """The options of a node that are not the defaults."""
        given: dict[str, object] = {"block_size": self.block, "cache_size": "100GiB", "free_space": "0"}
        given["range_size"] = self.stripe if peers else 8 << 20
        if peers:
            given["peers.stripe"] = self.stripe
        return given | self.options


class Run:
    """One lab with a loaded origin and so many hosts; its methods are the stages."""

    def __init__(
        self,
        plan: Plan,
        fleet: Fleet,
        source: Host,
        bucket: Bucket,
        digests: Mapping[str, str],
        meta: Path | None,
    ) -> None:
        self.plan = plan
        self.fleet = fleet
        self.source = source
        self._bucket = bucket
        self._digests = digests
        self._meta = meta
        self.files = sorted(digests)

    def _read(self, nodes: Sequence[Node], **more: Any) -> Reading:
        return read_together(nodes, self.files, self._digests, self.source, timeout=self.plan.timeout, **more)

    @contextlib.contextmanager
    def _nodes(self, contender: str) -> Iterator[list[Node]]:
        if contender == "rclone":
            with self.fleet.rclone() as nodes:
                yield nodes
        elif contender == "juicefs":
            assert self._meta is not None
            with self.fleet.juicefs(self._meta) as nodes:
                yield nodes
        else:
            peers = contender == "fusecache"
            with self.fleet.fusecache(peers=peers, options=self.plan.mount_options(peers)) as nodes:
                if peers:
                    wait_joined(nodes)
                yield nodes

    def together(self, contender: str) -> tuple[Reading, list[dict[str, Any]]]:
        """All nodes, with empty caches, read everything at the same moment."""
        with self._nodes(contender) as nodes:
            reading = self._read(nodes)
            return reading, self._statuses(contender, nodes)

    def killed(self) -> tuple[Reading, list[dict[str, Any]]]:
        """The same, and one node loses its power in the middle."""
        with self._nodes("fusecache") as nodes:
            victim = nodes[len(nodes) // 2]

            def kill(began: float) -> set[str]:
                pause(max(0.0, began + self.plan.bound / 2 - time.monotonic()))
                victim.kill()
                return {victim.host.name}

            reading = self._read(nodes, during=kill)
            alive = [node for node in nodes if node is not victim]
            statuses = self._statuses("fusecache", alive)
            victim.host.cut(connected=True)
            return reading, statuses

    def joins(self) -> Reading:
        """All but one node have everything; the last one comes, with an empty cache, and reads all."""
        with contextlib.ExitStack() as stack:
            nodes = stack.enter_context(self._nodes("fusecache"))
            self._read(nodes)
            fresh = nodes[-1]
            others = nodes[:-1]
            run([program("fusecache"), "umount", str(fresh.mountpoint)], timeout=60)
            shutil.rmtree(fresh.work, ignore_errors=True)
            wait_joined(others)
            number = len(nodes) - 1
            options = self.plan.mount_options(True)
            [joined] = stack.enter_context(self.fleet.fusecache(peers=True, options=options, only=[number]))
            wait_joined([*others, joined])
            return self._read([joined])

    def busy(self, readers: int) -> tuple[Reading, list[dict[str, Any]]]:
        """So many readers per node, in different orders, all at once."""
        with self._nodes("fusecache") as nodes:
            return self._read(nodes, readers=readers), self._statuses("fusecache", nodes)

    def _statuses(self, contender: str, nodes: Sequence[Node]) -> list[dict[str, Any]]:
        return [node.status() for node in nodes] if contender in ("fusecache", "plain") else []


@contextlib.contextmanager
def prepared(plan: Plan, nodes: int, model: Path, work: Path, contenders: Sequence[str]) -> Iterator[Run]:
    """A lab with `nodes` hosts, and an origin that holds the model."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab())
        source, bucket = stack.enter_context(origin(lab, work, "models"))
        upload(bucket, model)
        meta = _format_juicefs(bucket, model, work) if "juicefs" in contenders else None
        hosts = [lab.host(f"node-{number:02d}", plan.rate) for number in range(nodes)]
        source.limit(plan.rate)
        secret = work / "secret"
        secret.write_text(os.urandom(24).hex())
        secret.chmod(0o600)
        digests = {file.name: digest_of(file) for file in sorted(model.iterdir()) if file.suffix != ".json"}
        yield Run(plan, Fleet(hosts, bucket, work / "nodes", secret), source, bucket, digests, meta)


def _format_juicefs(bucket: Bucket, model: Path, work: Path) -> Path:
    """A JuiceFS volume in the same S3 server that holds the model; returns the database of its metadata."""
    home = work / "juicefs"
    home.mkdir()
    meta = home / "meta.db"
    volume = Bucket(bucket.endpoint, bucket.access_key, bucket.secret_key, "juicefs", "")
    S5cmd().make_bucket(volume)
    keys = {"ACCESS_KEY": bucket.access_key, "SECRET_KEY": bucket.secret_key}
    command = [
        program("juicefs"),
        "format",
        f"sqlite3://{meta}",
        "benchmark",
        "--storage=s3",
        f"--bucket={bucket.endpoint}/juicefs",
        "--trash-days=0",
    ]
    run(command, timeout=60, env=keys)
    mountpoint = home / "mnt"
    command = [
        program("juicefs"),
        "mount",
        f"sqlite3://{meta}",
        str(mountpoint),
        f"--cache-dir={home / 'cache'}",
        "--cache-size=0",
        "--no-bgjob",
        "--backup-meta=0",
        "--no-usage-report",
        "--no-syslog",
    ]
    with mounting(command, mountpoint, home / "juicefs.log"):
        shutil.copytree(model, mountpoint / bucket.prefix)
    return meta
