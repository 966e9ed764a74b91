"""The findings of a run: rows with targets and verdicts, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import median
from fusecache.control.mountinfo import find_file_system


@dataclass(frozen=True)
class Row:
    """One line of the table: `samples` are one value per round, and their median is the result."""

    key: str
    title: str
    samples: Sequence[float]
    target: float
    aim: float
    lower_is_better: bool = False
    unit: str = ""
    note: str = ""

    @property
    def value(self) -> float:
        """The median, NaN without samples."""
        return median(self.samples) if self.samples else float("nan")

    @property
    def verdict(self) -> str:
        """'aim' (reached), 'ok' (the target), 'missed' or 'failed' (not measured)."""
        if not self.samples:
            return "failed"
        sign = -1 if self.lower_is_better else 1
        if sign * self.value >= sign * self.aim:
            return "aim"
        return "ok" if sign * self.value >= sign * self.target else "missed"


@dataclass
class Report:
    """Everything a reader needs to judge or repeat the run."""

    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, list[str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Raw times: measurement -> contestant -> seconds per round."""
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def failed(self) -> bool:
        """Whether a row missed its target or could not be measured."""
        return any(row.verdict in ("missed", "failed") for row in self.rows)

    def write(self, path: Path) -> None:
        """Write the JSON; a reader never sees half of it."""
        document = asdict(self)
        for row, plain in zip(self.rows, document["rows"], strict=True):
            plain.update(value=row.value if row.samples else None, verdict=row.verdict)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)

    def print(self, console: Console) -> None:
        """Print the table and the problems."""
        table = Table(title="fusecache on one node: medians of the rounds")
        for name in ("", "measured", "target", "aim", "verdict"):
            table.add_column(name, justify="left" if name in ("", "verdict") else "right")
        style = {"aim": "bold green", "ok": "green", "missed": "bold red", "failed": "bold red"}
        for row in self.rows:
            sign = "<=" if row.lower_is_better else ">="
            table.add_row(
                f"{row.title}{f' [dim]({row.note})[/]' if row.note else ''}",
                f"{row.value:.3g}{row.unit}" if row.samples else "-",
                f"{sign} {row.target:g}{row.unit}",
                f"{row.aim:g}{row.unit}",
                f"[{style[row.verdict]}]{row.verdict}[/]",
            )
        console.print(table)
        for problem in self.problems:
            console.print(f"[red]problem:[/] {problem}", highlight=False)

    def plot(self, path: Path, model_bytes: int) -> None:
        """Draw the speed of each contestant, cold and warm, medians with all samples as dots."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        panels = [
            key for key in ("cold-parallel", "cold-sequential", "warm-sequential") if self.seconds.get(key)
        ]
        if not panels:
            return
        figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False)
        for axis, key in zip(axes[0], panels, strict=True):
            contestants = {name: samples for name, samples in self.seconds[key].items() if samples}
            if key == "warm-sequential" and (raw := self.seconds.get("warm-raw-sequential", {}).get("raw")):
                contestants["raw"] = raw
            for place, (name, samples) in enumerate(contestants.items()):
                speeds = [model_bytes / 1e9 / seconds for seconds in samples]
                color = "tab:green" if name.startswith("fusecache") else "tab:gray"
                axis.barh(place, median(speeds), color=color, zorder=1)
                axis.plot(speeds, [place] * len(speeds), "k.", markersize=4)
                axis.text(max(speeds), place, f"  {median(speeds):.2f}", va="center", fontsize=9)
            axis.set_yticks(range(len(contestants)), [LABELS.get(name, name) for name in contestants])
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.set_xlabel("GB/s")
            axis.set_title(TITLES[key])
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


TITLES = {
    "cold-parallel": "cold from S3, shards at once",
    "cold-sequential": "cold from S3, one shard after another",
    "warm-sequential": "warm from the local cache",
}


LABELS = {
    "fusecache-daemon": "fusecache,\nno passthrough",
    "s5cmd": "s5cmd cp\n(no mount)",
    "s3fs": "s3fs-fuse",
    "rclone": "rclone mount",
    "juicefs": "JuiceFS",
    "raw": "the cache's files\n(no mount)",
}


def machine_facts(work: Path) -> dict[str, Any]:
    """The facts that the figures depend on; nothing that names the machine."""
    cpu = _first(Path("/proc/cpuinfo").read_text().splitlines(), "model name")
    memory = _first(Path("/proc/meminfo").read_text().splitlines(), "MemTotal")
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory": memory,
        "python": platform.python_version(),
        "file_system": file_system_of(work),
    }


def file_system_of(path: Path) -> str:
    """Type of the file system that holds this path."""
    return find_file_system(path.resolve())[1]


def _first(lines: Iterable[str], name: str) -> str:
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "?")
