"""How fast one node gives to another over the loopback, beside iperf3: `python -m benchmarks.cluster.loopback`.

The giver is a real mount that has the model; the taker is the exchange's client in a process of its own, which checks
each block's checksum as a node does (`exchange`), or a second mount that also stores what it gets (`stored`). iperf3
moves the same number of streams in the same rounds to nowhere: 128 KiB that stay in the CPU's cache, as the system's
congestion control has it or with the exchange's (`iperf3 -C`), or (`iperf3 -F`) a file of the model, which has to come
from memory as the exchange's bytes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import xxhash
from rich.console import Console
from rich.table import Table

from benchmarks.cluster.example import mounted_node, wait_joined
from benchmarks.cluster.fleet import digest_of
from benchmarks.model import make_model
from benchmarks.processes import (
    ROOT,
    BenchmarkError,
    clean_environment,
    end_cleanly_on_signals,
    free_port,
    run,
    running,
    wait_until,
)
from benchmarks.tools.fusecache import status
from benchmarks.tools.seaweedfs import s3_server, upload
from fusecache.peers.transport.auth import RequestSigner
from fusecache.peers.transport.client import PeerClient
from fusecache.peers.transport.observer import RequestTimeout
from fusecache.peers.transport.wire import BlockRequest
from fusecache.types import ObjectId

STREAMS = 4
_BLOCK = 1 << 20
_RANGE = 16
"""Blocks per request: a stripe."""
_SECONDS = 3
_IPERF3 = {"iperf3": (), "iperf3 -C cubic": ("-C", "cubic"), "iperf3 -F": ("-F", "FILE")}
"""Name -> its arguments."""
_TAKE = "import sys; from benchmarks.cluster.loopback import take; take(*sys.argv[1:])"


@click.command()
@click.option("--size", type=click.IntRange(64), default=1024, show_default=True, help="MiB of the model.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default=Path("/dev/shm"))
@click.option(
    "--results", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "benchmarks/results"
)
def main(size: int, rounds: int, work: Path, results: Path) -> None:
    """Measure one node giving a model to another over the loopback, and iperf3 in the same rounds."""
    clean_environment()
    end_cleanly_on_signals()
    if shutil.which("iperf3") is None:
        raise click.ClickException("iperf3 is missing: ./scripts/setup bench installs it")
    folder = Path(tempfile.mkdtemp(dir=work, prefix="fusecache-loopback."))
    try:
        rates = measure(folder, size, rounds)
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    document = {
        "streams": STREAMS,
        "mib": size,
        "congestion": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "bytes_per_second": rates,
        "over": {other: {name: rate / medians[other] for name, rate in medians.items()} for other in _IPERF3},
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "loopback.json").write_text(json.dumps(document, indent=1) + "\n")
    title = f"From node to node over the loopback, {STREAMS} streams"
    table = Table("", "GB/s", *(f"over {other}" for other in _IPERF3), title=title)
    for name, rate in medians.items():
        ratios = [f"{rate / medians[other]:.2f}" for other in _IPERF3]
        table.add_row(name, f"{rate / 1e9:.2f}", *ratios)
    Console().print(table)


def measure(folder: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Bytes per second of each contender, per round."""
    rates: dict[str, list[float]] = {name: [] for name in (*_IPERF3, "exchange", "stored")}
    secret = folder / "secret"
    secret.write_text(os.urandom(24).hex())
    secret.chmod(0o600)
    ports = {"giver": free_port(), "taker": free_port()}
    with contextlib.ExitStack() as stack:
        bucket = stack.enter_context(s3_server(folder, "models"))
        model = make_model(folder / "model", shards=2, shard_mib=size // 2)
        upload(bucket, folder / "model")
        expected = {name: digest_of(folder / "model" / name) for name in model.shards}
        shutil.rmtree(folder / "model")
        options = {"peers.stripe": f"{_RANGE}MiB"}
        giver = stack.enter_context(mounted_node(folder, "giver", bucket, ports, secret, options))
        _read(giver, expected)
        perf = stack.enter_context(_iperf3_server(folder))
        url = f"http://127.0.0.1:{ports['giver']}"
        data = max((folder / "giver").rglob("*.data"), key=lambda path: path.stat().st_size)
        # the taker imports numpy, whose threads would spin beside it
        env = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        for _ in range(rounds):
            for name, more in _IPERF3.items():
                rates[name].append(_iperf3(perf, *(str(data) if word == "FILE" else word for word in more)))
            told = run([sys.executable, "-c", _TAKE, url, str(secret)], timeout=120, env=env)
            rates["exchange"].append(json.loads(told))
            with mounted_node(folder, "taker", bucket, ports, secret, options) as taker:
                wait_joined({"giver": giver, "taker": taker})
                began = time.monotonic()
                _read(taker, expected)
                rates["stored"].append(model.size / (time.monotonic() - began))
                if (got := status(taker)["bytes"]["origin"]) > model.size // 100:
                    raise BenchmarkError(f"the taker had {got} bytes from the origin")
            shutil.rmtree(folder / "taker", ignore_errors=True)
    return rates


def _read(mountpoint: Path, expected: dict[str, str]) -> None:
    for name, digest in expected.items():
        if digest_of(mountpoint / name) != digest:
            raise BenchmarkError(f"{mountpoint / name}: wrong bytes")


@contextlib.contextmanager
def _iperf3_server(folder: Path) -> Iterator[int]:
    port = free_port()
    with running(["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port)], folder / "iperf3.log", grace=0.2):

        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        wait_until(listens, "iperf3", 20)
        yield port


def _iperf3(port: int, *more: str) -> float:
    command = [
        "iperf3",
        "-c",
        "127.0.0.1",
        "-p",
        str(port),
        "-P",
        str(STREAMS),
        "-t",
        str(_SECONDS),
        "-J",
        *more,
    ]
    told: dict[str, Any] = json.loads(run(command, timeout=60))
    return float(told["end"]["sum_received"]["bits_per_second"]) / 8


class _HashedBlocks:
    """Checks blocks as a node does, and keeps nothing of them."""

    def __init__(self) -> None:
        self.received_bytes = 0
        self._checksum = 0
        self._digest = xxhash.xxh3_64()

    def begin_block(self, checksum: int) -> None:
        self._checksum = checksum
        self._digest.reset()

    def write(self, view: memoryview) -> None:
        self._digest.update(view)
        self.received_bytes += len(view)

    def end_block(self) -> bool:
        return (self._digest.intdigest() or 1) == self._checksum


def take(url: str, secret: str) -> None:
    """Entry point of the taking process: what the node has, again and again; prints bytes per second."""
    signer = RequestSigner(Path(secret).read_text().strip(), "client", "")
    client = PeerClient("client", signer=signer, receive_window=_BLOCK)
    found = client.request_json(url, "/v1/objects", 20.0)
    ranges = [
        (ObjectId(item["id"]), int(item["size"]), range(at, min(at + _RANGE, -(-item["size"] // _BLOCK))))
        for item in found
        if item["cached_bytes"] == item["size"] > _BLOCK
        for at in range(0, -(-item["size"] // _BLOCK), _RANGE)
    ]

    def one(work: tuple[ObjectId, int, range]) -> int:
        object_id, size, blocks = work
        request = BlockRequest(object_id, blocks, None, _BLOCK, stored_only=True, caller="client")
        receiver = _HashedBlocks()
        with contextlib.closing(client.request_blocks(url, request, size, RequestTimeout(60.0))) as answer:
            answer.receive_into(receiver)  # raises PeerError if a checksum is wrong
        return receiver.received_bytes

    def stream(number: int) -> int:
        total = 0
        while time.monotonic() - began < _SECONDS:
            total += sum(one(work) for work in ranges[number::STREAMS])
        return total

    began = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        total = sum(pool.map(stream, range(STREAMS)))
    print(total / (time.monotonic() - began))


if __name__ == "__main__":
    main()
