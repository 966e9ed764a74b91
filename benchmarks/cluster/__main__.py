"""The cluster benchmark: `python -m benchmarks.cluster`.

Starts an S3 server and so many nodes in network namespaces with limited links, takes the measurements, prints a table
and writes benchmarks/results/cluster.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.cluster.fleet import Reading
from benchmarks.cluster.lab import possible
from benchmarks.cluster.stages import CONTENDERS, Plan, Run, prepared
from benchmarks.model import make_model
from benchmarks.processes import ROOT, BenchmarkError, clean_environment, end_cleanly_on_signals

STAGES = ("together", "killed", "joins", "busy")
MIB = 1 << 20


@click.command()
@click.option("--nodes", default="4,8", show_default=True, help="Numbers of nodes.")
@click.option("--rate", type=float, default=12.0, show_default=True, help="MB/s of each link and the origin.")
@click.option("--size", type=click.IntRange(8), default=128, show_default=True, help="MiB of the model.")
@click.option("--contenders", default="fusecache,plain", show_default=True, help=", ".join(CONTENDERS))
@click.option("--stages", default=",".join(STAGES), show_default=True, help="What to measure.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default=Path("/dev/shm"))
@click.option(
    "--results", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "benchmarks/results"
)
def main(nodes: str, rate: float, size: int, contenders: str, stages: str, work: Path, results: Path) -> None:
    """Measure nodes that start together, lose one, join late, and are busy."""
    clean_environment()
    end_cleanly_on_signals()
    console = Console()
    if why := possible():
        raise click.ClickException(f"no network namespaces here: {why}")
    folder = Path(tempfile.mkdtemp(dir=work, prefix="fusecache-cluster."))
    rows: list[dict[str, Any]] = []
    try:
        model = make_model(folder / "model", shards=4, shard_mib=size // 4)
        plan = Plan(rate * 1e6, model.size, stripe=512 << 10, block=128 << 10, options={"concurrency": 2})
        for count in [int(word) for word in nodes.split(",")]:
            with prepared(plan, count, folder / "model", folder, contenders.split(",")) as ready:
                rows += _measure(console, plan, count, ready, contenders.split(","), stages.split(","))
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    document = {
        "rate": plan.rate, "size": plan.size, "stripe": plan.stripe, "block": plan.block,
        "concurrency": 2, "bound": plan.bound, "runs": rows,
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    (results / "cluster.json").write_text(json.dumps(document, indent=1) + "\n")
    _print(console, rows)


def _measure(
    console: Console, plan: Plan, count: int, ready: Run, contenders: list[str], stages: list[str]
) -> list[dict[str, Any]]:
    rows = []

    def add(stage: str, contender: str, reading: Reading, statuses: list[dict[str, Any]]) -> None:
        counters = ("fallbacks", "redirected", "hedged", "busy", "refused", "errors", "bad_blocks")
        rows.append(
            {
                "stage": stage,
                "contender": contender,
                "nodes": count,
                "seconds": reading.last,
                "over_bound": reading.last / plan.bound,
                "origin_wire": reading.origin_bytes / plan.size,
                "origin": sum(told["bytes"]["origin"] for told in statuses) / plan.size if statuses else None,
                "cpu_busy": reading.busy,
                "per_node": reading.seconds,
                "counters": {
                    name: sum(told.get("peers", {}).get(name, 0) for told in statuses) for name in counters
                },
            }
        )
        console.print(
            f"{count} nodes, {stage}, {contender}: {reading.last:.1f} s, {reading.last / plan.bound:.2f} x the bound"
        )

    if "together" in stages:
        for contender in contenders:
            reading, statuses = ready.together(contender)
            add("together", contender, reading, statuses)
    if "killed" in stages:
        reading, statuses = ready.killed()
        add("killed", "fusecache", reading, statuses)
    if "joins" in stages:
        add("joins", "fusecache", ready.joins(), [])
    if "busy" in stages and count == 8:
        reading, statuses = ready.busy(8)
        add("busy", "fusecache", reading, statuses)
    return rows


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "nodes", "stage", "", "time / bound", "copies from the origin", "CPUs busy", "refused, fallbacks",
        title="A cluster in the lab",
    )  # fmt: skip
    for row in rows:
        counters = row["counters"]
        origin = row["origin"] if row["origin"] is not None else row["origin_wire"]
        table.add_row(
            str(row["nodes"]),
            row["stage"],
            row["contender"],
            f"{row['over_bound']:.2f}",
            f"{origin:.3f}",
            f"{row['cpu_busy']:.0%}",
            f"{counters['refused']}, {counters['fallbacks']}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
