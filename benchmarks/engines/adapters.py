"""Thousands of LoRA adapters, loaded at random: `python -m benchmarks.engines.adapters`.

A bucket with a folder per adapter (adapter_config.json, adapter_model.safetensors), of which some are loaded in random
order, each once cold and once warm, with one worker and with eight: the JSON is parsed, every tensor is copied out with
safetensors. The time of each load, from the first open to the last tensor, is one sample; every contestant loads the
same adapters in the same order, one contestant after the other within a round, and the median of the rounds' p50 and
p99 is the result. Only adapters that are loaded have their full size, the others are there to be listed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.measure import drop_page_cache, median
from benchmarks.processes import (
    ROOT,
    BenchmarkError,
    clean_environment,
    end_cleanly_on_signals,
    wait_until,
)
from benchmarks.proxy import counting_relay
from benchmarks.report import machine_facts
from benchmarks.tools import Bucket, Tool
from benchmarks.tools.fusecache import Fusecache, status
from benchmarks.tools.rclone import Rclone
from benchmarks.tools.s3fs import S3fs
from benchmarks.tools.s5cmd import S5cmd
from benchmarks.tools.seaweedfs import s3_server
from benchmarks.tools.seaweedfs import version as server_version

MB = 1_000_000
SMALLEST = 1
PREFIX = "adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors")
TENSORS = 64
WORKERS = (1, 8)
COUNTED = 40
"""Adapters that are loaded once more through a relay that counts requests: it would slow down what is timed."""
TIMEOUT = 280.0
_MODULE = "benchmarks.engines.adapters"
"""This one, also when it is run as a program."""
TOOLS: dict[str, Callable[[], Tool]] = {"rclone": Rclone, "s3fs": S3fs}


@dataclass(frozen=True)
class Plan:
    """The adapters that are made and loaded. `picked` has, per number of workers, the names to load, in their order."""

    names: Sequence[str]
    sizes: dict[str, int]
    picked: Mapping[int, Sequence[str]]


def plan(adapters: int, loads: int, largest: int, seed: int = 7) -> Plan:
    """Names for all adapters; sizes in bytes, log-uniform from 1 to `largest` MB, for those that are loaded."""
    rng = random.Random(seed)
    names = [f"adapter-{number:05d}" for number in range(adapters)]
    chosen = rng.sample(names, min(adapters, loads))
    share = len(chosen) // len(WORKERS)
    picked = {workers: chosen[n * share : (n + 1) * share] for n, workers in enumerate(WORKERS)}
    low, high = math.log(SMALLEST * MB), math.log(largest * MB)
    sizes = {name: int(math.exp(rng.uniform(low, high))) for name in chosen}
    return Plan(names, sizes, picked)


def make(folder: Path, made: Plan) -> None:
    """Write the adapters; the weights of one are slices of a pool of noise, other ones for each."""
    import numpy as np
    from safetensors.numpy import save_file

    pool = np.frombuffer(
        random.Random(1).randbytes((max(made.sizes.values()) & ~1) + (4 << 20)), dtype=np.float16
    )
    config = json.dumps(
        {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    )
    for number, name in enumerate(made.names):
        home = folder / name
        home.mkdir(parents=True)
        (home / FILES[0]).write_text(config)
        each = max(16, made.sizes.get(name, 0) // TENSORS // 2)
        count = TENSORS if name in made.sizes else 1
        start = number * 1009 % (2 << 20)
        tensors = {f"layer.{n}.lora": pool[start + n * each : start + (n + 1) * each] for n in range(count)}
        save_file(tensors, home / FILES[1])


def load(folder: Path) -> tuple[float, int]:
    """Load one adapter as an engine does; seconds, and the bytes of its tensors."""
    from safetensors import safe_open

    started = time.perf_counter()
    config = json.loads((folder / FILES[0]).read_bytes())
    total = 0
    with safe_open(folder / FILES[1], framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            total += weights.get_tensor(name).nbytes
    seconds = time.perf_counter() - started
    if config["peft_type"] != "LORA":
        raise BenchmarkError(f"{folder} holds another configuration")
    return seconds, total


def timed(root: Path, names: Sequence[str], workers: int) -> list[float]:
    """Seconds per load; the names are dealt out to processes that start together. Raises BenchmarkError."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {_MODULE} import worker; worker(sys.argv[1])"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(workers)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        for number, child in enumerate(children):
            assert child.stdin is not None
            child.stdin.write(json.dumps(names[number::workers]) + "\n")
            child.stdin.flush()
        found: list[float] = []
        until = time.monotonic() + TIMEOUT
        for child in children:
            out, _ = child.communicate(timeout=max(1.0, until - time.monotonic()))
            if child.returncode:
                raise BenchmarkError(f"a load from {root} failed")
            found += json.loads(out)
        return found
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"loads from {root}: not within {TIMEOUT:g} s") from None
    finally:
        for child in children:
            child.kill()
            child.wait()


def worker(root: str) -> None:
    """A process that loads what it is told to, and prints the seconds of each load."""
    import numpy  # noqa: F401
    import safetensors  # noqa: F401

    print("ready", flush=True)
    names = json.loads(sys.stdin.readline())
    print(json.dumps([load(Path(root) / name)[0] for name in names]))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all values does not exceed; NaN for none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass
class Run:
    """One run: its bucket and plan, and what was measured: (contestant, state, workers) -> samples per round."""

    bucket: Bucket
    made: Plan
    source: Path
    work: Path
    tick: Callable[[str], None]
    samples: dict[tuple[str, str, int], list[list[float]]]
    facts: dict[str, Any]
    problems: list[str]

    def add(self, name: str, state: str, workers: int, samples: list[float]) -> None:
        """One round's samples."""
        self.samples.setdefault((name, state, workers), []).append(samples)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder for one mount and its cache."""
        path = self.work / "mount"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def local(self) -> None:
        """A copy on the local disk."""
        for workers, names in self.made.picked.items():
            drop_page_cache(self.source / name / file for name in names for file in FILES)
            self.add("local", "warm", workers, timed(self.source, names, workers))

    def tool(self, tool: Tool) -> None:
        """Cold, then warm, in one mount with an empty cache."""
        with self.folder() as work, tool.mounted(self.bucket, work) as mount:
            os.listdir(mount)  # one listing of the folder, as a server makes when it starts
            for workers, names in self.made.picked.items():
                self.add(tool.name, "cold", workers, timed(mount, names, workers))
            if isinstance(tool, Fusecache):
                wait_until(lambda: not status(mount)["loader"]["fetching"], "the rest of the adapters", 60)
                wanted = 2 * sum(map(len, self.made.picked.values()))
                self.facts["objects"] = {
                    "loaded": wanted,
                    "in_cache": status(mount)["cache"]["objects_complete"],
                }
            for workers, names in self.made.picked.items():
                drop_page_cache(mount / name / file for name in names for file in FILES)
                self.add(tool.name, "warm", workers, timed(mount, names, workers))

    def count(self, tool: Tool) -> None:
        """Requests for metadata per adapter, cold, counted on the wire."""
        names = self.made.picked[WORKERS[0]][:COUNTED]
        with self.folder() as work, counting_relay(self.bucket.endpoint) as relay:
            with tool.mounted(replace(self.bucket, endpoint=relay.endpoint), work) as mount:
                timed(mount, names, 1)
            self.facts.setdefault("metadata_requests", {})[tool.name] = {
                "adapters": len(names),
                "requests": relay.metadata,
                "per_adapter": relay.metadata / len(names),
            }


def measure(run: Run, tools: Sequence[Tool], rounds: int) -> None:
    """All contestants in each round, in an order that rotates; one that fails is named and left out."""
    contestants: dict[str, Callable[[], None]] = {"local": run.local}
    for tool in tools:
        contestants[tool.name] = lambda tool=tool: run.tool(tool)  # type: ignore[misc]
    for number in range(rounds):
        names = list(contestants)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run.tick(f"{name}, round {number + 1} of {rounds}")
            _attempt(run, name, contestants)
    for tool in tools:
        if tool.name in contestants:
            run.tick(f"counting the requests of {tool.name}")
            _attempt(run, tool.name, {tool.name: lambda tool=tool: run.count(tool)})  # type: ignore[misc]


def _attempt(run: Run, name: str, contestants: dict[str, Callable[[], None]]) -> None:
    try:
        contestants[name]()
    except (BenchmarkError, OSError) as error:
        run.problems.append(f"{name}: {error}")
        del contestants[name]


def results(run: Run) -> list[dict[str, Any]]:
    """Per contestant, state and number of workers: p50 and p99 in seconds, the median of the rounds."""
    return [
        {
            "contestant": name,
            "state": state,
            "workers": workers,
            "loads": len(rounds[0]),
            "p50": median(percentile(samples, 0.5) for samples in rounds),
            "p99": median(percentile(samples, 0.99) for samples in rounds),
            "rounds": [{"p50": percentile(each, 0.5), "p99": percentile(each, 0.99)} for each in rounds],
        }
        for (name, state, workers), rounds in run.samples.items()
    ]


def _show(console: Console, rows: Sequence[dict[str, Any]], run: Run) -> None:
    table = Table("contestant", "state", "workers", "p50 ms", "p99 ms", box=None)
    for row in sorted(rows, key=lambda row: (row["workers"], row["state"], row["p50"])):
        cells = (row["contestant"], row["state"], str(row["workers"]))
        table.add_row(*cells, f"{row['p50'] * 1000:.1f}", f"{row['p99'] * 1000:.1f}")
    console.print(table)
    for name, found in run.facts.get("metadata_requests", {}).items():
        console.print(
            f"{name}: {found['requests']} LIST and HEAD requests for {found['adapters']} adapters, "
            f"{found['per_adapter']:.3f} per adapter",
            highlight=False,
        )
    for problem in run.problems:
        console.print(f"failed: {problem}", highlight=False, markup=False)


@click.command()
@click.option("--adapters", type=click.IntRange(1), default=5000, show_default=True, help="In the bucket.")
@click.option(
    "--loads", type=click.IntRange(1), default=200, show_default=True, help="Half with 1 worker, half with 8."
)
@click.option("--largest", type=click.IntRange(2), default=25, show_default=True, help="MB of an adapter.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--tools", default=",".join(TOOLS), show_default=True, help="Contestants besides fusecache.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/dev/shm"),
    show_default=True,
    help="Folder for the server's data and all caches.",
)
@click.option(
    "--results",
    "target",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "benchmarks" / "results",
    show_default="benchmarks/results",
    help="Folder for the JSON.",
)
def main(adapters: int, loads: int, largest: int, rounds: int, tools: str, work: Path, target: Path) -> None:
    """Load LoRA adapters at random from a bucket of many, through fusecache, rclone, s3fs and from a local copy."""
    console = Console()
    end_cleanly_on_signals()
    clean_environment()
    try:
        unknown = set(filter(None, tools.split(","))) - set(TOOLS)
        if unknown:
            raise BenchmarkError(f"unknown tool {unknown.pop()!r}: use {', '.join(TOOLS)}")
        chosen: list[Tool] = [Fusecache(), *(TOOLS[name]() for name in tools.split(",") if name)]
        made = plan(adapters, loads, largest)
        total = sum(made.sizes.values())
        if shutil.disk_usage(work).free < 4 * total:
            raise BenchmarkError(f"{work}: this run needs up to {4 * total // MB} MB: use --loads or --work")
        with tempfile.TemporaryDirectory(prefix="fca.", dir=work, ignore_cleanup_errors=True) as folder:
            run, versions, machine = _run(Path(folder), made, chosen, rounds, console)
    except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; everything was stopped and removed") from None
    rows = results(run)
    console.print(
        f"{len(made.names)} adapters in the bucket; the {len(made.sizes)} that are loaded have {SMALLEST} to "
        f"{largest} MB (log-uniform, {total // MB} MB in all), the others a few hundred bytes",
        highlight=False,
    )
    _show(console, rows, run)
    report = {
        "settings": {
            "adapters": adapters,
            "loads": loads,
            "largest_mb": largest,
            "rounds": rounds,
            "bytes_loaded": total,
        },
        "machine": machine,
        "versions": versions,
        "facts": run.facts,
        "problems": run.problems,
        "results": rows,
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "adapters.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"written: {os.path.relpath(target)}/adapters.json", highlight=False)
    raise SystemExit(1 if run.problems else 0)


def _run(
    work: Path, made: Plan, tools: Sequence[Tool], rounds: int, console: Console
) -> tuple[Run, dict[str, str], dict[str, Any]]:
    def tick(text: str) -> None:
        console.print(text, highlight=False)

    with s3_server(work, "bench") as server:
        bucket = replace(server, prefix=PREFIX)
        tick(f"making {len(made.names)} adapters")
        make(work / "source", made)
        tick("uploading them")
        S5cmd().upload(work / "source", bucket, PREFIX)
        run = Run(bucket, made, work / "source", work, tick, {}, {}, [])
        measure(run, tools, rounds)
        versions = {tool.name: tool.version() for tool in tools} | {"seaweedfs": server_version()}
        return run, versions, machine_facts(work)


if __name__ == "__main__":
    main()
