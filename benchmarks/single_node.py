"""The single-node benchmark: `python -m benchmarks.single_node`.

Starts an S3 server, fusecache and its competitors on this machine, takes all measurements of the table in one
run, prints it, and writes benchmarks/results/single_node.{json,png}.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import stages
from benchmarks.model import MIB, make_model
from benchmarks.processes import ROOT, BenchmarkError, clean_environment, end_cleanly_on_signals
from benchmarks.report import Report, machine_facts
from benchmarks.tools import Tool
from benchmarks.tools.fusecache import Fusecache
from benchmarks.tools.juicefs import JuiceFS
from benchmarks.tools.rclone import Rclone
from benchmarks.tools.s3fs import S3fs
from benchmarks.tools.s5cmd import S5cmd
from benchmarks.tools.seaweedfs import s3_server
from benchmarks.tools.seaweedfs import version as server_version

TOOLS: dict[str, Callable[[], Tool]] = {"rclone": Rclone, "s3fs": S3fs, "juicefs": JuiceFS}
STAGES = ("warm", "against", "listing", "memory")
COPIES = 6  # of the model, at the worst moment: objects, JuiceFS's own, a copy, two in a cache, one to spare


def names_of(known: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """A callback for an option that takes names of these, separated by commas."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
        names = [name for name in value.split(",") if name]
        for name in names:
            if name not in known:
                raise click.BadParameter(f"unknown name {name!r}: use {', '.join(known)}")
        return names

    return parse


@click.command()
@click.option("--quick", is_flag=True, help="Small and few: 64 MiB shards, 2 rounds, 2,000 objects.")
@click.option("--size", type=click.IntRange(1), default=512, show_default=True, help="MiB per shard.")
@click.option(
    "--shards", type=click.IntRange(1, 4), default=4, show_default=True, help="Shards of the model."
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Rounds.")
@click.option(
    "--only", callback=names_of(STAGES), default=",".join(STAGES), show_default=True, help="Stages."
)
@click.option(
    "--tools",
    callback=names_of(tuple(TOOLS)),
    default=",".join(TOOLS),
    show_default=True,
    help="Competitors.",
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
    default=ROOT / "benchmarks" / "results",
    show_default="benchmarks/results",
    help="Folder for the JSON and the plot.",
)
def main(
    quick: bool,
    size: int,
    shards: int,
    repeat: int,
    only: list[str],
    tools: list[str],
    work: Path,
    results: Path,
) -> None:
    """Measure fusecache on this machine against the raw disk, s5cmd, rclone, s3fs-fuse and JuiceFS."""
    if quick:
        size, repeat = min(size, 64), min(repeat, 2)
    console = Console()
    end_cleanly_on_signals()
    clean_environment()
    report = Report({"quick": quick, "shards": shards, "shard_mib": size, "rounds": repeat, "stages": only})
    try:
        check_space(work, COPIES * shards * size * MIB)
        with tempfile.TemporaryDirectory(prefix="fcb.", dir=work, ignore_cleanup_errors=True) as folder:
            report.machine = machine_facts(Path(folder))
            _measure(report, Path(folder), console, only, [TOOLS[name]() for name in tools])
    except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; everything was stopped and removed") from None
    report.print(console)
    report.write(results / "single_node.json")
    with contextlib.suppress(ImportError):
        report.plot(results / "single_node.png", int(report.settings["model_bytes"]))
    console.print(f"written: {os.path.relpath(results)}/single_node.json and .png", highlight=False)
    raise SystemExit(1 if report.failed() else 0)


def check_space(work: Path, needed: int) -> None:
    """Raises BenchmarkError when this folder has no room for so many bytes."""
    free = shutil.disk_usage(work).free
    memory = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    if work.resolve() == Path("/dev/shm").resolve():
        free = min(free, int(memory) * 1024)
    if free < needed:
        raise BenchmarkError(
            f"{work} has {free >> 20} MiB to spare, this run needs up to {needed >> 20}: use --size or --work"
        )


def _measure(report: Report, work: Path, console: Console, only: list[str], tools: list[Tool]) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, s3_server(work, "bench") as bucket:
        task = progress.add_task("making the model", total=None)
        quiet = not console.is_terminal

        def tick(text: str) -> None:
            progress.update(task, description=text)
            if quiet:
                console.print(text, highlight=False)

        settings = report.settings
        tick(f"making a model of {settings['shards']} x {settings['shard_mib']} MiB")
        model = make_model(work / "source", shards=settings["shards"], shard_mib=settings["shard_mib"])
        settings["model_bytes"] = model.size
        sizes = [(model.directory / name).stat().st_size for name in model.shards]
        tick("uploading it")
        S5cmd().upload(model.directory, bucket, bucket.prefix)
        if "against" in only:
            for tool in list(tools):
                tick(f"preparing {tool.name}")
                try:
                    tool.prepare(bucket, model.directory, work)
                    report.versions[tool.name] = tool.version()
                    report.options[tool.name] = list(tool.settings())
                except (BenchmarkError, OSError) as error:
                    report.problems.append(f"{tool.name}: {error}")
                    tools.remove(tool)
        report.versions.update(s5cmd=S5cmd().version(), seaweedfs=server_version())
        try:
            report.versions["fusecache"] = Fusecache().version()
        except BenchmarkError as error:
            report.problems.append(f"fusecache: {error}")
        shutil.rmtree(model.directory)
        setting = stages.Setting(bucket, model, sizes, work, settings["rounds"], report, tick)
        objects = 2_000 if settings["quick"] else 10_000
        table: dict[str, Callable[[], Any]] = {
            "warm": lambda: stages.warm(setting),
            "against": lambda: stages.against(setting, tools),
            "listing": lambda: stages.listing(setting, objects),
            "memory": lambda: stages.memory(setting),
        }
        for name in only:
            try:
                table[name]()
            except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                report.problems.append(f"{name}: {error}")
        report.facts["gigabytes_per_second"] = stages.summary(setting)


if __name__ == "__main__":
    main()
