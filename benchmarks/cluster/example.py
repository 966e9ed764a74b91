"""A cluster to look at: mounts on ports of the loopback that read one model from one S3 server at the same moment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.cluster.fleet import digest_of
from benchmarks.model import make_model
from benchmarks.processes import (
    BenchmarkError,
    clean_environment,
    end_cleanly_on_signals,
    free_port,
    program,
    run,
    unmount,
    wait_until,
)
from benchmarks.tools import Bucket
from benchmarks.tools.fusecache import end, status
from benchmarks.tools.seaweedfs import s3_server, upload

_MIB = 1 << 20


@click.command()
@click.option("--size", type=click.IntRange(1), default=64, show_default=True, help="MiB per shard.")
@click.option(
    "--shards", type=click.IntRange(1, 16), default=2, show_default=True, help="Shards of the model."
)
@click.option("--nodes", type=click.IntRange(2, 16), default=3, show_default=True, help="Mounts.")
def main(size: int, shards: int, nodes: int) -> None:
    """Start a cluster on this machine, read one model on all its nodes, show where the bytes came from."""
    clean_environment()
    end_cleanly_on_signals()
    console = Console()
    work = Path(tempfile.mkdtemp(prefix="fusecache-cluster."))
    try:
        _show(console, work, size, shards, nodes)
    except BenchmarkError as error:
        console.print(f"cluster: {error}", style="red", markup=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _show(console: Console, work: Path, size: int, shards: int, nodes: int) -> None:
    with contextlib.ExitStack() as stack:
        bucket = stack.enter_context(s3_server(work, "models"))
        model = make_model(work / "model", shards=shards, shard_mib=size)
        upload(bucket, work / "model")
        expected = {name: digest_of(work / "model" / name) for name in model.shards}
        secret = work / "secret"
        secret.write_text(os.urandom(24).hex())
        secret.chmod(0o600)
        ports = {f"node-{number + 1}": free_port() for number in range(nodes)}
        mounts = {
            name: stack.enter_context(
                mounted_node(work, name, bucket, ports, secret, {"peers.stripe": "4MiB"})
            )
            for name in ports
        }
        console.print(
            f"{nodes} nodes are mounted; each reads all {model.size / _MIB:.0f} MiB at the same moment"
        )
        wait_joined(mounts)

        def read(mountpoint: Path) -> None:
            for name, digest in expected.items():
                if digest_of(mountpoint / name) != digest:
                    raise BenchmarkError(f"{mountpoint / name}: wrong bytes")

        with ThreadPoolExecutor(nodes) as pool:
            list(pool.map(read, mounts.values()))
        table = Table(
            "node", "from the origin", "from other nodes", "given to others", title="Every byte checked"
        )
        total = 0
        for name, mountpoint in mounts.items():
            told = status(mountpoint)
            total += told["bytes"]["origin"]
            given = [told["bytes"]["origin"], told["bytes"]["peer"], told["peers"]["bytes_out"]]
            table.add_row(name, *(f"{nbytes / _MIB:.1f} MiB" for nbytes in given))
        console.print(table)
        console.print(f"The origin gave {total / model.size:.2f} copies of the model to {nodes} nodes.")
        first = next(iter(mounts.values()))
        console.print("\nfusecache peers", style="bold")
        subprocess.run([program("fusecache"), "peers", str(first)], check=False, timeout=60)


@contextlib.contextmanager
def mounted_node(
    work: Path,
    name: str,
    bucket: Bucket,
    ports: Mapping[str, int],
    secret: Path,
    more: Mapping[str, object],
) -> Iterator[Path]:
    """The mount of one node of a cluster on the loopback, whose ports are given by name; `more` options."""
    home = work / name
    mountpoint = home / "mnt"
    mountpoint.mkdir(parents=True)
    options = {
        "endpoint_url": bucket.endpoint,
        "cache_dir": home / "cache",
        "peers.discovery": "static",
        "peers.members": ";".join(f"http://127.0.0.1:{port}" for port in ports.values()),
        "peers.listen": f"127.0.0.1:{ports[name]}",
        "peers.node": name,
        "peers.secret_file": secret,
        **more,
    }
    words = ",".join(f"{key}={value}" for key, value in options.items())
    pid = 0
    try:
        run(
            [program("fusecache"), "mount", bucket.url, str(mountpoint), "-o", words],
            timeout=60,
            env=bucket.environment,
        )
        pid = int(status(mountpoint)["process"]["pid"])
        yield mountpoint
    finally:
        with contextlib.suppress(BenchmarkError):
            run([program("fusecache"), "umount", str(mountpoint)], timeout=60)
        unmount(mountpoint)
        if pid:
            end(pid)


def wait_joined(mounts: Mapping[str, Path]) -> None:
    """Until all nodes see each other."""

    def joined() -> bool:
        found = [
            json.loads(run([program("fusecache"), "status", str(path), "--json"], timeout=30))
            for path in mounts.values()
        ]
        return all(told["peers"]["nodes"] == len(mounts) for told in found)

    wait_until(joined, "the nodes see each other", 60)


if __name__ == "__main__":
    main()
