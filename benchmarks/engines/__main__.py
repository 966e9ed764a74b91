"""The benchmark of engines and loaders: `python -m benchmarks.engines`.

Starts an S3 server behind a limited link, takes the measurements of the chosen stages, merges them into
benchmarks/results/engines.json, draws engines.png beside it and prints the table of all that is there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from benchmarks.cluster.lab import possible
from benchmarks.engines.results import TOOLS, WARM, Results, plot, read, table
from benchmarks.engines.site import site
from benchmarks.engines.stages import STAGES, Setting, told
from benchmarks.model import MIB
from benchmarks.processes import ROOT, BenchmarkError, clean_environment, end_cleanly_on_signals
from benchmarks.report import machine_facts
from benchmarks.single_node import check_space, names_of
from benchmarks.tools import Tool
from benchmarks.tools.fusecache import Fusecache
from benchmarks.tools.juicefs import JuiceFS
from benchmarks.tools.rclone import Rclone
from benchmarks.tools.s3fs import S3fs
from benchmarks.tools.s5cmd import S5cmd
from benchmarks.tools.seaweedfs import version as server_version

_TOOLS: dict[str, Callable[[], Tool]] = {"rclone": Rclone, "s3fs": S3fs, "juicefs": JuiceFS}
_COPIES = 5  # of the model, at the worst moment: the source, objects, JuiceFS's own, a cache, a copy


@click.command()
@click.option("--quick", is_flag=True, help="Small and few: 32 MiB shards, 2 rounds; writes no results.")
@click.option(
    "--stages",
    callback=names_of(tuple(STAGES)),
    default=",".join(STAGES),
    show_default=True,
    help="What to measure.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds of each stage.")
@click.option("--add", is_flag=True, help="Add the rounds to those of earlier runs with the same settings.")
@click.option("--size", type=click.IntRange(1), default=512, show_default=True, help="MiB per shard.")
@click.option("--shards", type=click.IntRange(1, 8), default=4, show_default=True, help="Shards of a model.")
@click.option("--rate", type=click.FloatRange(1), default=200.0, show_default=True, help="MB/s of the links.")
@click.option(
    "--engine-size", type=click.IntRange(350), default=2000, show_default=True, help="MiB of vLLM's model."
)
@click.option(
    "--loaders",
    callback=names_of(tuple(WARM)),
    default=",".join(WARM),
    show_default=True,
    help="Of the stage warm.",
)
@click.option(
    "--tools",
    callback=names_of(tuple(TOOLS)),
    default=",".join(TOOLS),
    show_default=True,
    help="Competitors in the stages cold, ranks and vllm; '' for none.",
)
@click.option(
    "--engine-python", default=sys.executable, help="The interpreter that has vLLM.  [default: this one]"
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/dev/shm"),
    show_default=True,
    help="Folder for the server's data and all caches.",
)
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder for the JSON and the plot.  [default: benchmarks/results; none with --quick]",
)
def main(
    quick: bool,
    stages: list[str],
    rounds: int,
    add: bool,
    size: int,
    shards: int,
    rate: float,
    engine_size: int,
    loaders: list[str],
    tools: list[str],
    engine_python: str,
    work: Path,
    results: Path | None,
) -> None:
    """Measure how fast engines and loaders start from a mount, cold over a limited link and warm."""
    if quick:
        size, rounds, engine_size = min(size, 32), min(rounds, 2), min(engine_size, 400)
    elif results is None:
        results = ROOT / "benchmarks" / "results"
    console = Console()
    end_cleanly_on_signals()
    clean_environment()
    if why := possible():
        raise click.ClickException(f"no network namespaces here: {why}")

    def tick(text: str) -> None:
        console.print(text, highlight=False)

    found = Results(versions={"s5cmd": S5cmd().version(), "seaweedfs": server_version()})
    try:
        # A broken file of results is told of before anything is measured.
        document = read(results / "engines.json") if results is not None else Results()
        check_space(work, _COPIES * max(shards * size, engine_size) * MIB)
        with tempfile.TemporaryDirectory(prefix="fce.", dir=work, ignore_cleanup_errors=True) as folder:
            found.machine = machine_facts(Path(folder))
            found.versions["fusecache"] = Fusecache().version()
            with site(Path(folder), "bench") as place:
                setting = Setting(
                    place,
                    found,
                    tick,
                    rounds,
                    rate * 1e6,
                    shards,
                    size,
                    engine_size,
                    loaders,
                    {name: _TOOLS[name] for name in tools},
                    engine_python,
                )
                for name in stages:
                    with told(setting, name):
                        STAGES[name](setting)
    except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; everything was stopped and removed") from None
    document.merge(found, stages, more=add)
    console.print(table(document), markup=False, highlight=False, soft_wrap=True)
    for stage, texts in document.problems.items():
        for text in texts:
            console.print(f"[red]problem:[/] {stage}: {text}", highlight=False)
    if results is not None:
        document.write(results / "engines.json")
        with contextlib.suppress(ImportError):
            plot(document, results / "engines.png")
        console.print(f"written: {os.path.relpath(results)}/engines.json and .png", highlight=False)
    raise SystemExit(1 if any(row.verdict in ("missed", "failed") for row in document.rows()) else 0)


if __name__ == "__main__":
    main()
