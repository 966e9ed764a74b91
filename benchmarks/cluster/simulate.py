"""Beyond these machines: `python -m benchmarks.cluster.simulate`.

Simulates clusters of 100 to 10,000 nodes with 100 Gbit/s NICs that read a model of 1 TB from an origin of 100 Gbit/s,
with the project's own placement and scheduling; prints a table, and writes benchmarks/results/simulation.json and
simulation.png. With results of `python -m benchmarks.cluster` beside them it says how far the simulation is from those.

1 TB in 16 MiB stripes for 10,000 nodes is 600 million transfers. So a slice is simulated, its length below, with all
nodes, real stripes and real files, and what a further part of it takes is taken for the rest. The blocks of simulated
stripes are larger (STEPS per stripe), so that a stripe is passed on in coarser steps than it is: the times are too long
by that. The larger the cluster, the larger the stripes, whose requests are what the nodes' CPUs are busy with.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.cluster.simulation import simulate
from benchmarks.cluster.simulation_report import WHOLE, Check, Result, check_table, plot, table_of, validate
from benchmarks.cluster.simulation_world import GBIT, Setting
from benchmarks.processes import ROOT, BenchmarkError

GIB = 1 << 30
STEPS = 4
SCENARIOS: dict[str, dict[str, Any]] = {
    "all well": {},
    "1 % slow": {"slow": 0.01},
    "1 % die": {"dead": 0.01},
}
"""Slow nodes have a tenth of the others' rate; those that die do so half-way."""


def _slice(nodes: int, transfers: float, stripe: int, shard: int) -> int:
    """Bytes of the model that so many transfers carry: whole files, an even number of them."""
    return max(2, round(transfers * stripe / nodes / shard / 2) * 2) * shard


@click.command()
@click.option("--nodes", default="100,1000,10000", show_default=True, help="Numbers of nodes.")
@click.option("--stripe", default="16,64", show_default=True, help="MiB of a stripe (peers.stripe).")
@click.option(
    "--transfers",
    type=float,
    default=1e5,
    show_default=True,
    help="Stripes that arrive at a node, of all nodes together, in one run: about 10,000 a second are simulated.",
)
@click.option("--shard", type=click.IntRange(1), default=1, show_default=True, help="GiB of a file.")
@click.option(
    "--rate", type=float, default=100.0, show_default=True, help="Gbit/s of a NIC, and of the origin."
)
@click.option("--scenarios", default=",".join(SCENARIOS), show_default=True, help="Which of these.")
@click.option(
    "--validate",
    "measured",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROOT / "benchmarks/results/cluster.json",
    help="Results of python -m benchmarks.cluster.",
)
@click.option("--validate-only", is_flag=True, help="Only compare with those.")
@click.option(
    "--latency",
    type=float,
    default=0.01,
    show_default=True,
    help="Seconds of the lab's links, which have queues of 20 ms.",
)
@click.option(
    "--results", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "benchmarks/results"
)
def main(
    nodes: str,
    stripe: str,
    transfers: float,
    shard: int,
    rate: float,
    scenarios: str,
    measured: Path,
    validate_only: bool,
    latency: float,
    results: Path,
) -> None:
    """Simulate clusters that are larger than this machine."""
    console = Console()
    names = [name.strip() for name in scenarios.split(",")]
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise click.UsageError(f"no scenario {unknown[0]!r}: there are {', '.join(SCENARIOS)}")
    try:
        counts = [int(word) for word in nodes.split(",")]
        stripes = [int(word) << 20 for word in stripe.split(",")]
    except ValueError:
        raise click.UsageError("--nodes and --stripe take numbers with commas between") from None
    checks: list[Check] = []
    bound = None
    if measured.exists() or validate_only:
        try:
            checks = validate(measured, latency, seeds=range(3))
            bound = float(json.loads(measured.read_text())["bound"])
        except BenchmarkError as error:
            raise click.ClickException(str(error)) from None
        console.print(check_table(checks))
    if validate_only:
        return
    found: list[Result] = []
    for count in counts:
        for size in stripes:
            for name in names:
                found.append(_run(console, name, count, size, transfers, shard * GIB, rate * GBIT))
    console.print(table_of(found))
    results.mkdir(parents=True, exist_ok=True)
    document = {
        "model": WHOLE,
        "steps": STEPS,
        "results": [result.plain() for result in found],
        "checks": [{**dataclasses.asdict(check), "error": check.error} for check in checks],
    }
    (results / "simulation.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(results / "simulation.png", found, checks, bound)


def _run(
    console: Console, name: str, nodes: int, stripe: int, transfers: float, shard: int, rate: float
) -> Result:
    began = time.monotonic()
    setting = Setting(
        nodes,
        _slice(nodes, transfers, stripe, shard),
        shard=shard,
        stripe=stripe,
        block=max(1 << 20, stripe // STEPS),
        rate=rate,
        origin_rate=rate,
        **SCENARIOS[name],
    )
    half = simulate(dataclasses.replace(setting, size=setting.size // 2))
    result = Result(name, half, simulate(setting))
    console.print(
        f"{nodes} nodes, stripes of {stripe >> 20} MiB, {name}: {result.outcome.over_bound:.2f} x the bound for "
        f"{setting.size / 1e9:.1f} GB, {result.whole:.2f} for 1 TB ({time.monotonic() - began:.0f} s)"
    )
    return result


if __name__ == "__main__":
    main()
