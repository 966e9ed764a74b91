"""The plot of the cluster benchmark: time over the lower bound against the number of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAMES = {
    "fusecache": "fusecache, one cluster",
    "plain": "fusecache, each by itself",
    "rclone": "rclone mount, each by itself",
    "juicefs": "JuiceFS, each by itself",
}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the stage in which all nodes start together."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for contender, name in _NAMES.items():
        points = sorted(
            (row["nodes"], row["over_bound"])
            for row in rows
            if row["stage"] == "together" and row["contender"] == contender
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1.0, color="0.6", linestyle=":", label="lower bound: size / bandwidth")
    axes.set_yscale("log", base=2)
    axes.set_xscale("log", base=2)
    counts = sorted({row["nodes"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    ticks = [1, 2, 4, 8, 16]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("nodes that start together")
    axes.set_ylabel("time until all have all,\nover size / bandwidth")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
