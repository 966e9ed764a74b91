"""Nodes of a cluster on this machine: real mounts, or `fusecache serve`, each with a store and a port of its own."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cluster.lab import Host
from fusecache.control import client, mounts
from tests.support import live
from tests.support.content import content
from tests.support.logs import WATCH
from tests.support.mounting import RealMount, command, mounted
from tests.support.servers import S3Bucket, free_port, running, wait_until

SECRET = "a-secret-for-the-tests-only"
MIB = 1 << 20


class Nodes:
    """Starts nodes of one cluster that read `source`; all end with the block that `cluster` opens."""

    def __init__(
        self,
        work: Path,
        source: str,
        env: Mapping[str, str],
        ports: Mapping[str, int],
        stack: contextlib.ExitStack,
    ) -> None:
        self.work = work
        self.source = source
        self.env = dict(env)
        self.ports = dict(ports)
        self.mounts: dict[str, RealMount] = {}
        self._stack = stack
        self.hosts: dict[str, Host] = {}
        """Where nodes run that have a namespace of their own."""
        self.secret = work / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)

    def url(self, name: str) -> str:
        """Where a node serves."""
        host = self.hosts[name].address if name in self.hosts else "127.0.0.1"
        return f"http://{host}:{self.ports[name]}"

    def options(self, name: str, **more: object) -> dict[str, object]:
        """Its options: names with a dot are given with `peers__name`."""
        given: dict[str, object] = {
            "peers.discovery": "static",
            "peers.members": ";".join(self.url(other) for other in self.ports),
            "peers.listen": self.url(name).removeprefix("http://"),
            "peers.node": name,
            "peers.secret_file": self.secret,
            "peers.stripe": "1MiB",
            "block_size": "256KiB",
            "metadata_ttl": "1h",
        }
        given |= {key.replace("__", "."): value for key, value in more.items()}
        return {key: value for key, value in given.items() if value is not None}

    def mount(self, name: str, **options: object) -> RealMount:
        """Mount one; returns when it has looked at the others."""
        return self._stack.enter_context(self.mounted(name, **options))

    @contextlib.contextmanager
    def mounted(self, name: str, prefix: Sequence[str] = (), **options: object) -> Iterator[RealMount]:
        """The same, for as long as this is entered; started behind `prefix`."""
        work = self.work / name
        work.mkdir(exist_ok=True)
        before = [*(self.hosts[name].command([]) if name in self.hosts else []), *prefix]
        given = self.options(name, **options)
        with mounted(self.source, work, env=self.env, prefix=before, **given) as made:
            self.mounts[name] = made
            try:
                yield made
            finally:
                if self.mounts.get(name) is made:
                    del self.mounts[name]

    def serve(self, name: str, **options: object) -> subprocess.Popen[bytes]:
        """Run `fusecache serve`; returns when it serves."""
        work = self.work / name
        work.mkdir(exist_ok=True)
        given = {"cache_dir": work / "cache", "cache_size": "1GiB", "runtime_dir": work / "run"}
        given |= self.options(name, **options)
        log = work / "serve.log"
        argv = [sys.executable, "-m", "fusecache.cli.main", "serve", self.source]
        argv += ["-o", ",".join(f"{key}={value}" for key, value in given.items())]
        WATCH.watch(work, log.name)
        WATCH.expect("^fusecache: serving as node ")
        process = self._stack.enter_context(running(argv, log, self.env))

        def serving() -> bool:
            text = log.read_text(errors="replace") if log.exists() else ""
            assert process.poll() is None, text
            return "serving as node" in text

        wait_until(serving, f"node {name} serves", 30)
        return process

    def ask(self, name: str, operation: str) -> Any:
        """An operation of a node's control socket."""
        if name in self.mounts:
            return live.asked(self.mounts[name], operation)
        socket = mounts.control_socket_path(self.work / name / "run", mounts.serve_mountpoint(name))
        return client.call_daemon(socket, operation, timeout=live.HANG)

    def states(self, name: str) -> dict[str, str]:
        """State of each member as one node sees it."""
        return {row["name"]: row["state"] for row in self.ask(name, "peers")["members"]}

    def wait_members(self, *names: str) -> None:
        """Until each of these sees all of these alive, and nobody else."""
        wanted = set(names)

        def agreed() -> bool:
            return all(
                {other for other, state in self.states(name).items() if state == "alive"} == wanted
                for name in names
            )

        wait_until(agreed, f"{', '.join(names)} see each other", 30)

    def origin_bytes(self) -> int:
        """Bytes that all mounts took from the origin."""
        return sum(self.ask(name, "status")["bytes"]["origin"] for name in self.mounts)


@contextlib.contextmanager
def cluster(work: Path, source: str, env: Mapping[str, str], *names: str) -> Iterator[Nodes]:
    """Names and free ports for a cluster; start its nodes with the methods of what this gives."""
    with contextlib.ExitStack() as stack:
        ports = {name: free_port() for name in names}
        yield Nodes(work, source, env, ports, stack)


def kill_node(mount: RealMount) -> None:
    """kill -9 of all processes of a mount at once, as if the machine had lost its power."""
    pids = [live.keeper_pid(mount), int(live.asked(mount, "status")["process"]["pid"])]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def fill(bucket: S3Bucket, prefix: str, files: int, size: int) -> list[str]:
    """Put objects of checkable content; returns their keys below the prefix."""
    keys = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    for key in keys:
        bucket.put(f"{prefix}/{key}", content(key, 1, 0, size))
    return keys


def daemon_pid(mount: RealMount) -> int:
    """The daemon that serves a mount now."""
    return int(live.asked(mount, "status")["process"]["pid"])


def report(mount: RealMount) -> dict[str, Any]:
    """`fusecache peers --json`."""
    return dict(json.loads(command("peers", str(mount.path), "--json", env=mount.env).stdout))


@contextlib.contextmanager
def answering(port: int, pages: Mapping[str, object]) -> Iterator[None]:
    """Something else than a node at this port: answers these paths with JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(pages.get(self.path)).encode()
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
