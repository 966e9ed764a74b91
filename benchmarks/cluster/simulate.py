"""Beyond these machines: `python -m benchmarks.cluster.simulate`.

Simulates clusters of 100 to 10,000 nodes with 100 Gbit/s NICs that read a model of 1 TB from an origin of 100 Gbit/s,
with the project's own placement and scheduling; prints a table, and writes benchmarks/results/simulation.json and
simulation.png. With results of `python -m benchmarks.cluster` beside them it says how far the simulation is from those.

1 TB in 16 MiB stripes for 10,000 nodes is 600 million transfers. So a slice of the model is simulated, with all nodes
and real stripes, as long as --transfers allows, and of --least stripes; what its second half took is taken for the rest
of the model. The blocks of simulated stripes are larger (STEPS per stripe), so that a stripe is passed on in coarser
steps than it is: the times are too long by that. Slices of less than some seconds are too short for slow nodes to be
found slow.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.cluster.simulation import SimulationOutcome, run_simulation
from benchmarks.cluster.simulation_report import (
    MODEL_BYTES,
    LabComparison,
    ScenarioResult,
    compare_with_lab,
    comparison_table,
    plot_results,
    results_table,
)
from benchmarks.cluster.simulation_world import GBIT, SimulationSetting
from benchmarks.processes import ROOT, BenchmarkError

RESULTS = ROOT / "benchmarks/results"
SHARD_BYTES = 5 << 30
"""Bytes of a file, where the slice has room for two of them."""
BLOCKS_PER_STRIPE = 4
SCENARIOS: dict[str, dict[str, Any]] = {
    "all well": {},
    "1 % slow": {"slow": 0.01},
    "1 % die": {"dead": 0.01},
}
"""Slow nodes have a tenth of the others' rate; those that die do so half-way."""


@click.command()
@click.option("--nodes", default="100,1000,10000", show_default=True, help="Numbers of nodes.")
@click.option(
    "--stripe", default="64", show_default=True, help="MiB of a stripe (peers.stripe); several with commas."
)
@click.option(
    "--transfers",
    type=float,
    default=4e5,
    show_default=True,
    help="Stripes that arrive at a node, of all nodes together, in one run: about 5,000 a second are simulated.",
)
@click.option(
    "--least",
    type=click.IntRange(2),
    default=100,
    show_default=True,
    help="Stripes that each node reads at least, however many transfers that makes.",
)
@click.option(
    "--rate", type=float, default=100.0, show_default=True, help="Gbit/s of a NIC, and of the origin."
)
@click.option("--scenarios", default=",".join(SCENARIOS), show_default=True, help="Which of these.")
@click.option(
    "--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True, help="Runs at a time."
)
@click.option(
    "--validate",
    "measured",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    default=[RESULTS / "cluster.json"],
    help="Results of python -m benchmarks.cluster; may be given several times.",
)
@click.option("--validate-only", is_flag=True, help="Only compare with those.")
@click.option(
    "--latency",
    type=float,
    default=0.01,
    show_default=True,
    help="Seconds of a packet on the lab's links, one way.",
)
@click.option("--results", type=click.Path(file_okay=False, path_type=Path), default=RESULTS)
def main(
    nodes: str,
    stripe: str,
    transfers: float,
    least: int,
    rate: float,
    scenarios: str,
    jobs: int,
    measured: tuple[Path, ...],
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
        cases = [(int(count), int(size) << 20) for count in nodes.split(",") for size in stripe.split(",")]
        if min(min(case) for case in cases) < 1:
            raise ValueError
    except ValueError:
        raise click.UsageError("--nodes and --stripe take numbers with commas between") from None
    checks: list[LabComparison] = []
    for path in measured:
        if path.exists() or validate_only:
            try:
                checks += compare_with_lab(path, latency, seeds=range(3))
            except BenchmarkError as error:
                raise click.ClickException(str(error)) from None
    if checks:
        console.print(comparison_table(checks))
    if validate_only:
        return
    found = _run_cases(console, cases, names, transfers, least, rate * GBIT, jobs)
    console.print(results_table(found))
    results.mkdir(parents=True, exist_ok=True)
    document = {
        "model": MODEL_BYTES,
        "steps": BLOCKS_PER_STRIPE,
        "results": [result.as_json() for result in found],
        "checks": [{**dataclasses.asdict(check), "error": check.error} for check in checks],
    }
    (results / "simulation.json").write_text(json.dumps(document, indent=1) + "\n")
    plot_results(results / "simulation.png", found, checks)


def _run_cases(
    console: Console,
    cases: Sequence[tuple[int, int]],
    names: Sequence[str],
    transfers: float,
    least: int,
    rate: float,
    jobs: int,
) -> list[ScenarioResult]:
    settings: list[SimulationSetting] = []
    wanted: list[tuple[str, SimulationSetting, SimulationSetting, SimulationSetting]] = []
    for nodes, stripe in cases:
        size, shard = _slice_sizes(max(least, round(transfers / nodes)), stripe)
        block = max(1 << 20, stripe // BLOCKS_PER_STRIPE)
        well = SimulationSetting(
            nodes, size, shard=shard, stripe=stripe, block=block, rate=rate, origin_rate=rate
        )
        for name in names:
            setting = dataclasses.replace(well, **SCENARIOS[name])
            longer = dataclasses.replace(setting, dead=0.0)
            shorter = dataclasses.replace(longer, size=size // 2)
            wanted.append((name, setting, shorter, longer))
            settings += [setting, longer, shorter]
    settings = sorted(
        set(settings), key=lambda setting: (-setting.nodes * setting.size, setting.slow, setting.dead)
    )
    outcomes: dict[SimulationSetting, SimulationOutcome] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for outcome in pool.map(run_simulation, settings):
            setting = outcome.setting
            outcomes[setting] = outcome
            console.print(
                f"{setting.nodes} nodes, {setting.size / 1e9:.1f} GB in stripes of {setting.stripe >> 20} MiB, "
                f"{setting.slow:.0%} slow, {setting.dead:.0%} die: {outcome.over_bound:.2f} x the bound",
                highlight=False,
            )
    return [
        ScenarioResult(name, outcomes[setting], outcomes[shorter], outcomes[longer])
        for name, setting, shorter, longer in wanted
    ]


def _slice_sizes(stripes: int, stripe: int) -> tuple[int, int]:
    """Bytes of so many stripes of the model, and of each of its files, of which there is an even number."""
    shard = max(1, min(SHARD_BYTES // stripe, stripes // 2))
    return max(1, stripes // shard // 2) * 2 * shard * stripe, shard * stripe


if __name__ == "__main__":
    main()
