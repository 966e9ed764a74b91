"""Measurements, piece by piece: invocations add to one JSON file, and the table is made of what it holds.

A measurement has its settings, and a list of seconds per contestant, one per round. Later rounds are added to those of
the same settings; otherwise the new ones replace the old.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines.loaders import LOADERS
from benchmarks.measure import median
from benchmarks.processes import BenchmarkError
from benchmarks.report import Row

US = "fusecache"
TOOLS = {"rclone": "rclone mount", "s3fs": "s3fs-fuse", "juicefs": "JuiceFS"}
Samples = list[float | None]
WARM = [name for name in LOADERS if name != "sparse"]


@dataclass
class Measurement:
    """One line of the issue's table: who took how long, round by round, and how busy the CPUs were meanwhile."""

    settings: dict[str, Any]
    seconds: dict[str, Samples] = field(default_factory=dict)
    """None: not measured in this round."""
    busy: dict[str, Samples] = field(default_factory=dict)
    """Share of the CPUs' time that was not idle."""
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, number: int, name: str, seconds: float, busy: float) -> None:
        """One contestant in the round of this number, from 0."""
        for table, value in ((self.seconds, seconds), (self.busy, busy)):
            samples = table.setdefault(name, [])
            samples.extend([None] * (number - len(samples)))
            samples.append(value)

    def add(self, other: Measurement) -> None:
        """More rounds under the same settings: neighbours stay neighbours, whoever was not there."""
        count = max((len(samples) for samples in self.seconds.values()), default=0)
        for mine, theirs in ((self.seconds, other.seconds), (self.busy, other.busy)):
            for name, samples in theirs.items():
                before = mine.setdefault(name, [])
                before.extend([None] * (count - len(before)))
                before.extend(samples)
        self.facts.update(other.facts)

    def taken(self, name: str) -> list[float]:
        """The seconds of this contestant."""
        return [value for value in self.seconds.get(name, ()) if value is not None]

    def paired(self, above: str, below: str) -> list[float]:
        """above / below, of the rounds that both have."""
        both = zip(self.seconds.get(above, ()), self.seconds.get(below, ()), strict=False)
        return [a / b for a, b in both if a is not None and b is not None]

    @property
    def bound(self) -> float:
        """Seconds that the bytes take through the link."""
        return float(self.settings["bytes"] / self.settings["rate"])


@dataclass
class Results:
    """All measurements, by name, and what a reader needs to judge or repeat them."""

    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, list[str]] = field(default_factory=dict)
    measurements: dict[str, Measurement] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Per stage, of its last run."""

    def measurement(self, name: str, settings: dict[str, Any]) -> Measurement:
        """The measurement of this name, a new one if there is none."""
        return self.measurements.setdefault(name, Measurement(settings))

    def problem(self, stage: str, text: str) -> None:
        """Something that could not be measured, and why."""
        self.problems.setdefault(stage, []).append(text)

    def merge(self, later: Results, stages: Sequence[str], *, more: bool) -> None:
        """Take over what a later invocation found in these stages. `more`: add its rounds to those that are there;
        what was measured under other settings is replaced all the same."""
        self.machine = later.machine
        self.versions.update(later.versions)
        self.options.update(later.options)
        for name in ("tools", *stages):
            self.problems.pop(name, None)
        self.problems.update(later.problems)
        for name, found in later.measurements.items():
            mine = self.measurements.get(name)
            if more and mine is not None and mine.settings == found.settings:
                mine.add(found)
            else:
                self.measurements[name] = found

    def write(self, path: Path) -> None:
        """Write the JSON; a reader never sees half of it."""
        document = asdict(self)
        document["rows"] = [
            {**asdict(row), "value": row.value if row.samples else None, "verdict": row.verdict}
            for row in self.rows()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)

    def rows(self) -> list[Row]:
        """The table, of what was measured."""
        makers = (_bound_rows, _learned_rows, _warm_rows, _vllm_rows, _tool_rows)
        return [row for make in makers for row in make(self)]


def read(path: Path) -> Results:
    """The results that `write` wrote; empty results where there is no file. Raises BenchmarkError."""
    if not path.exists():
        return Results()
    try:
        document = json.loads(path.read_text())
        document.pop("rows", None)
        found = {name: Measurement(**plain) for name, plain in document.pop("measurements").items()}
        return Results(**document, measurements=found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchmarkError(f"{path} does not hold results of this benchmark ({error}): remove it") from None


def _busy(found: Measurement, name: str) -> str:
    samples = [value for value in found.busy.get(name, ()) if value is not None]
    return f"CPUs {median(samples):.0%} busy" if samples else ""


def _bound_rows(results: Results) -> list[Row]:
    rows = []
    for name, title in (("cold", "safetensors lazy"), ("ranks", "2 ranks x all shards")):
        found = results.measurements.get(name)
        if found is None:
            continue
        samples = [seconds / found.bound for seconds in found.taken(US)]
        notes = [_busy(found, US)]
        if plain := found.taken("s5cmd"):
            notes.append(f"s5cmd cp alone: {median(plain) / found.bound:.3f}")
        title = f"cold, network-bound, {title}: / (size / bandwidth)"
        rows.append(
            Row(name, title, samples, 1.10, 1.03, True, "", "; ".join(note for note in notes if note))
        )
    return rows


def _learned_rows(results: Results) -> list[Row]:
    found = results.measurements.get("learned")
    if found is None:
        return []
    title = "second cold load with a learned order, 30 % of the tensors: / without"
    return [Row("learned", title, found.paired("learned", "plain"), 0.5, 0.4, True)]


def _warm_rows(results: Results) -> list[Row]:
    rows = []
    for name in WARM:
        found = results.measurements.get(f"warm-{name}")
        if found is not None:
            samples = found.paired(US, "local")
            rows.append(
                Row(f"warm-{name}", f"warm, {LOADERS[name][0]}: / local file", samples, 1.05, 1.0, True)
            )
    return rows


def _vllm_rows(results: Results) -> list[Row]:
    found = results.measurements.get("vllm")
    if found is None:
        return []
    samples = found.paired(US, "s5cmd")
    title = "cold vLLM start to first token: / (s5cmd cp, then vLLM from the copy)"
    return [Row("vllm", title, samples, 0.85, 0.85, True, "", _busy(found, US))]


_LOADS = (
    ("cold", "cold"),
    ("ranks", "cold, 2 ranks"),
    ("again", "warm"),
    ("vllm", "cold vLLM start"),
)


def _tool_rows(results: Results) -> list[Row]:
    rows = []
    for key, title in TOOLS.items():
        for name, load in _LOADS:
            found = results.measurements.get(name)
            if found is not None and key in found.seconds:
                samples = found.paired(key, US)
                rows.append(Row(f"{name}-{key}", f"{load}: times as fast as {title}", samples, 1.0, 2.0))
    return rows


def table(results: Results) -> str:
    """The rows as a table in Markdown."""
    lines = ["| | measured | at least | aim |", "|---|---|---|---|"]
    for row in results.rows():
        sign = "<=" if row.lower_is_better else ">="
        measured = f"{row.value:.2f}" if row.samples else "not measured"
        if row.samples and row.verdict == "missed":
            measured = f"**{measured}** (missed)"
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {row.title}{note} | {measured} | {sign} {row.target:g} | {sign} {row.aim:g} |")
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """Draw each load's seconds: medians as bars, samples as dots, the bound of the network as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [name for name in PANELS if name in results.measurements]
    warm = [name for name in WARM if f"warm-{name}" in results.measurements]
    count = len(panels) + bool(warm)
    if not count:
        return
    figure, axes = pyplot.subplots(1, count, figsize=(4.4 * count, 4), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=False):
        found = results.measurements[name]
        names = sorted((key for key in found.seconds if found.taken(key)), key=lambda key: (key != US, key))
        for place, key in enumerate(names):
            samples = found.taken(key)
            middle = median(samples)
            axis.barh(place, middle, color="tab:green" if key == US else "tab:gray", zorder=1)
            axis.plot(samples, [place] * len(samples), "k.", markersize=4)
            axis.text(max(samples), place, f"  {middle:.1f}", va="center", fontsize=9)
        axis.set_yticks(range(len(names)), [LABELS.get(key, key) for key in names])
        if found.settings.get("rate"):
            axis.axvline(found.bound, color="tab:red", linewidth=1, zorder=2)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlabel("seconds")
        axis.set_title(PANELS[name])
    if warm:
        _plot_warm(axes[0][-1], results, warm)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_warm(axis: Any, results: Results, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        samples = results.measurements[f"warm-{name}"].paired(US, "local")
        axis.barh(place, median(samples), color="tab:green", zorder=1)
        axis.plot(samples, [place] * len(samples), "k.", markersize=4)
        axis.text(max(samples), place, f"  {median(samples):.2f}", va="center", fontsize=9)
    axis.axvline(1.0, color="tab:red", linewidth=1, zorder=2)
    axis.set_yticks(range(len(names)), [LOADERS[name][0] for name in names])
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("time / local file")
    axis.set_title("warm")


PANELS = {
    "cold": "cold, one process\n(red: the network's bound)",
    "ranks": "cold, 2 ranks",
    "again": "warm, one process",
    "learned": "cold, 30 % of the tensors",
    "vllm": "vLLM, cold start to first token\n(red: the download alone)",
}
LABELS = {
    **TOOLS,
    "s5cmd": "s5cmd cp",
    "plain": "no order learned",
    "learned": "learned order",
}
