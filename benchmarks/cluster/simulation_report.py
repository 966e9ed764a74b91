"""The results of the simulation, as a table, as JSON and as a plot; and how far they are from measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.cluster.simulation import SimulationOutcome, run_simulation
from benchmarks.cluster.simulation_world import SimulationSetting
from benchmarks.processes import BenchmarkError

MODEL_BYTES = 1_000_000_000_000
"""Bytes of the model to which results are extrapolated."""


@dataclass(frozen=True)
class ScenarioResult:
    """A scenario, and the `outcome` of a slice of the model. `shorter` and `longer` are the outcomes of a slice of
    half the length and one like it without deaths, which come once and not again in every further part."""

    scenario: str
    outcome: SimulationOutcome
    shorter: SimulationOutcome
    longer: SimulationOutcome

    @property
    def steady_over_bound(self) -> float:
        """Seconds over the bound that each further part of the model takes, if all go on as the longer slice's second
        half did; no less than 1, since a slice that short may still gain on a slow start."""
        if self.longer.last_done_at is None or self.shorter.last_done_at is None:
            return float("nan")
        more = self.longer.setting.bound - self.shorter.setting.bound
        return max(1.0, (self.longer.last_done_at - self.shorter.last_done_at) / more)

    @property
    def whole_over_bound(self) -> float:
        """Time over the bound for WHOLE bytes, extrapolated."""
        if self.outcome.last_done_at is None:
            return float("nan")
        bound = self.outcome.setting.bound
        rest = bound * max(0.0, MODEL_BYTES / self.outcome.setting.size - 1)
        return (self.outcome.last_done_at + rest * self.steady_over_bound) / (bound + rest)

    def as_json(self) -> dict[str, Any]:
        """The result as it is written into the results."""
        return {
            "scenario": self.scenario,
            "whole_over_bound": self.whole_over_bound,
            "steady_over_bound": self.steady_over_bound,
            "slice": self.outcome.as_json(),
        }


def results_table(results: Sequence[ScenarioResult]) -> Table:
    """One row per result."""
    table = Table(
        "nodes",
        "stripe",
        "",
        "simulated",
        "time / bound",
        "1 TB / bound",
        "slow nodes",
        "copies from the origin",
        "most sent",
        "waits",
        "no connection, errors, fallbacks",
        title=f"Simulated: all nodes read a model of {MODEL_BYTES / 1e12:g} TB at the same moment",
        caption="bound: the time the bytes take through one link. A slice of the model is simulated; 1 TB is that, "
        "and the rest at the pace of its second half. Slow nodes: the last of them over its own bound. "
        "Waits: mean and longest time until a node turns to a request.",
    )
    for result in results:
        outcome = result.outcome
        setting = outcome.setting
        slow = outcome.last_slow_done_at
        table.add_row(
            str(setting.nodes),
            f"{setting.stripe >> 20} MiB",
            result.scenario,
            f"{setting.size / 1e9:.1f} GB",
            f"{outcome.over_bound:.2f}",
            f"{result.whole_over_bound:.2f}",
            "" if slow is None else f"{slow * setting.slow_rate / setting.bound:.2f}",
            f"{outcome.origin_copies:.3f}",
            f"{outcome.busiest_copies:.2f}",
            f"{outcome.mean_wait * 1e3:.0f}, {outcome.longest_wait * 1e3:.0f} ms",
            f"{outcome.not_connected}, {outcome.errors}, {outcome.fallbacks}",
        )
    return table


@dataclass(frozen=True)
class LabComparison:
    """A number of nodes, measured and simulated; seconds."""

    nodes: int
    rate: float
    """Bytes per second of each link."""
    bound: float
    measured: float
    simulated: float
    busy: float
    """Share of the time for which the lab's CPUs were busy: where they always were, they were the limit, which the
    simulation does not know."""

    @property
    def error(self) -> float:
        """How far the simulation is from the measurement, as a part of the latter."""
        return self.simulated / self.measured - 1


def compare_with_lab(path: Path, latency: float, seeds: Sequence[int]) -> list[LabComparison]:
    """Simulate what `python -m benchmarks.cluster` measured (its cluster.json): fusecache nodes that start together.
    The links are slower by what else than bytes of the model went over the origin's: headers, and packets sent again.
    Raises BenchmarkError."""
    try:
        document = json.loads(path.read_text())
        rows = [
            row for row in document["runs"] if (row["stage"], row["contender"]) == ("together", "fusecache")
        ]
        measured: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            measured.setdefault(int(row["nodes"]), []).append(row)
        checks = [
            _compare_runs(document, count, found, latency, seeds) for count, found in sorted(measured.items())
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path}: not a result of python -m benchmarks.cluster: {type(error).__name__}: {error}"
        ) from None
    if not checks:
        raise BenchmarkError(f"{path}: fusecache was not measured with nodes that start together")
    return checks


def _compare_runs(
    document: Mapping[str, Any],
    nodes: int,
    rows: Sequence[Mapping[str, Any]],
    latency: float,
    seeds: Sequence[int],
) -> LabComparison:
    overhead = sum(row["origin_wire"] / row["origin"] for row in rows) / len(rows)
    rate = document["rate"] / max(1.0, overhead)
    times = []
    for seed in seeds:
        outcome = run_simulation(
            SimulationSetting(
                nodes,
                document["size"],
                shard=document["size"] // 4,
                stripe=document["stripe"],
                block=document["block"],
                rate=rate,
                origin_rate=rate,
                latency=latency,
                concurrency=document["concurrency"],
                seed=seed,
            )
        )
        times.append(float("nan") if outcome.last_done_at is None else outcome.last_done_at)
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    busy = sum(row["cpu_busy"] for row in rows) / len(rows)
    return LabComparison(nodes, document["rate"], document["bound"], seconds, sum(times) / len(times), busy)


def comparison_table(checks: Sequence[LabComparison]) -> Table:
    """One row per number of nodes."""
    table = Table(
        "nodes",
        "link",
        "measured",
        "simulated",
        "error",
        "the lab's CPUs busy",
        title="The lab's runs, simulated",
    )
    for check in checks:
        table.add_row(
            str(check.nodes),
            f"{check.rate / 1e6:g} MB/s",
            f"{check.measured:.1f} s",
            f"{check.simulated:.1f} s",
            f"{check.error:+.0%}",
            f"{check.busy:.0%}",
        )
    return table


def plot_results(path: Path, results: Sequence[ScenarioResult], checks: Sequence[LabComparison]) -> None:
    """Time over the bound against the number of nodes: simulated, and beside it measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2))
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        setting = result.outcome.setting
        name = f"{result.scenario}, stripes of {setting.stripe >> 20} MiB"
        lines.setdefault(name, []).append((setting.nodes, result.whole_over_bound))
    for name, points in lines.items():
        axes[0].plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes[0].set_xscale("log")
    axes[0].set_title("simulated: 1 TB, 100 Gbit/s")
    axes[0].legend(fontsize=8)
    for color, rate in zip(
        ("tab:green", "tab:blue", "tab:orange"), sorted({check.rate for check in checks}), strict=False
    ):
        some = [check for check in checks if check.rate == rate]
        counts, name = [check.nodes for check in some], f"{rate / 1e6:g} MB/s"
        measured = [check.measured / check.bound for check in some]
        simulated = [check.simulated / check.bound for check in some]
        axes[1].plot(counts, measured, "o-", color=color, label=f"lab, {name}")
        axes[1].plot(counts, simulated, "s--", color=color, alpha=0.5, label=f"simulated, {name}")
    if checks:
        axes[1].legend(fontsize=8)
    axes[1].set_title("the lab's namespaces")
    for axis in axes:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(bottom=0.9)
        axis.set_xlabel("nodes")
    axes[0].set_ylabel("time until the last has all / (size / B)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
