"""The cluster benchmark: `python -m benchmarks.cluster`.

Starts an S3 server and so many nodes in network namespaces with limited links, takes the measurements, prints a table
and writes cluster.json and cluster.png below benchmarks/results. The time of a node that reads the origin by itself
goes with the number of nodes, so such nodes get a smaller model; what is compared is time over size / bandwidth.
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
from benchmarks.cluster.plot import plot
from benchmarks.cluster.stages import CONTENDERS, Plan, Run, prepared
from benchmarks.model import make_model
from benchmarks.processes import ROOT, BenchmarkError, clean_environment, end_cleanly_on_signals

STAGES = ("together", "killed", "joins", "busy")
WELL_LOOKED_AT = 8
"""The number of nodes with which all stages are run."""


@click.command()
@click.option("--nodes", default="4,8,16", show_default=True, help="Numbers of nodes.")
@click.option("--rate", type=float, default=3.0, show_default=True, help="MB/s of each link and the origin.")
@click.option("--size", type=click.IntRange(8), default=256, show_default=True, help="MiB of the model.")
@click.option(
    "--small", type=click.IntRange(8), default=16, show_default=True, help="MiB of the model of the others."
)
@click.option("--contenders", default=",".join(CONTENDERS), show_default=True, help="Who takes part.")
@click.option("--stages", default=",".join(STAGES), show_default=True, help="What to measure with 8 nodes.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default=Path("/dev/shm"))
@click.option(
    "--results", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "benchmarks/results"
)
def main(
    nodes: str, rate: float, size: int, small: int, contenders: str, stages: str, work: Path, results: Path
) -> None:
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
        tiny = make_model(folder / "small", shards=4, shard_mib=small // 4)
        # in proportion to the stripes: defaults that are right for 100 times the bandwidth
        options = {"concurrency": 2, "read_ahead": "1MiB"}
        plan = Plan(rate * 1e6, model.size, stripe=512 << 10, block=128 << 10, options=options)
        small_plan = Plan(rate * 1e6, tiny.size, block=128 << 10)
        others = [name for name in contenders.split(",") if name != "fusecache"]
        for count in [int(word) for word in nodes.split(",")]:
            chosen = stages.split(",") if count == WELL_LOOKED_AT else ["together"]
            if "fusecache" in contenders.split(","):
                with prepared(
                    plan, count, folder / "model", folder / f"cluster-{count}", ["fusecache"]
                ) as ready:
                    rows += _measure(console, plan, count, ready, ["fusecache"], chosen)
            if others and "together" in chosen:
                with prepared(
                    small_plan, count, folder / "small", folder / f"others-{count}", others
                ) as ready:
                    rows += _measure(console, small_plan, count, ready, others, ["together"])
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    document = {
        "rate": plan.rate,
        "size": plan.size,
        "stripe": plan.stripe,
        "block": plan.block,
        "concurrency": 2,
        "bound": plan.bound,
        "small_size": small_plan.size,
        "runs": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    plot(rows, results / "cluster.png")
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
    if "busy" in stages:
        reading, statuses = ready.busy(8)
        add("busy", "fusecache", reading, statuses)
    return rows


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "nodes",
        "stage",
        "",
        "time / bound",
        "copies from the origin",
        "CPUs busy",
        "refused, fallbacks",
        title="A cluster in the lab",
    )
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
