"""Where the time of a cold load goes: `python -m benchmarks.profile_cold`.

The same objects from the same server by `s5cmd cp`, by the origin engine alone, by the engine with the least a
cache must do (write and hash), and through a mount; with the CPU seconds of each part, since on a machine with
few CPUs a load is bound by their sum, and the threads of the daemon that took most of it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.engine import Taken, timed_engine
from benchmarks.measure import TICKS, median, usage_of
from benchmarks.model import make_model
from benchmarks.processes import BenchmarkError, clean_environment, end_cleanly_on_signals
from benchmarks.readers import timed
from benchmarks.tools import Bucket
from benchmarks.tools.fusecache import Fusecache, status
from benchmarks.tools.s5cmd import S5cmd
from benchmarks.tools.seaweedfs import s3_server, upload


@dataclass
class Cost:
    """One load: seconds on the clock, and CPU seconds by who spent them."""

    seconds: float
    server: float
    reader: float
    """Of the downloader, or of the programs that read the mount."""
    daemon: float = 0.0
    daemon_kernel: float = 0.0
    """Of the daemon's, those inside the kernel."""
    machine: float = 0.0
    """Of everything on this machine, the kernel's threads included."""
    threads: dict[str, float] = field(default_factory=dict)


def children_cpu() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine_cpu() -> float:
    """CPU seconds that all CPUs were busy since boot."""
    fields = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    idle = fields[3] + fields[4]  # and not the eighth, what the hypervisor took away
    return (sum(fields) - idle) / TICKS


def threads_of(*pids: int) -> dict[str, float]:
    """CPU seconds per thread of these processes, threads of one name together."""
    found: dict[str, float] = {}
    for task in (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
        with contextlib.suppress(OSError):
            head, _, rest = (task / "stat").read_text().rpartition(")")
            fields = rest.split()
            name = head.partition("(")[2]
            found[name] = found.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / TICKS
    return found


def measure(
    bucket: Bucket, load: Callable[[], float | Taken], daemons: Callable[[], list[int]] = list
) -> Cost:
    """Run one load and take everybody's CPU time around it."""

    server, children, machine = usage_of(bucket.server_pid).cpu_seconds, children_cpu(), machine_cpu()
    used = [usage_of(pid) for pid in daemons()]
    threads = threads_of(*daemons())
    took = load()
    machine = machine_cpu() - machine
    reader = children_cpu() - children
    seconds = took.seconds if isinstance(took, Taken) else took
    if isinstance(took, Taken):
        # The start of a Python process costs a CPU second of its own.
        machine -= reader - took.cpu
        reader = took.cpu
    server = usage_of(bucket.server_pid).cpu_seconds - server
    now = [usage_of(pid) for pid in daemons()]
    daemon = sum(usage.cpu_seconds for usage in now) - sum(usage.cpu_seconds for usage in used)
    kernel = sum(usage.system_seconds for usage in now) - sum(usage.system_seconds for usage in used)
    spent = {name: total - threads.get(name, 0.0) for name, total in threads_of(*daemons()).items()}
    busiest = dict(sorted(spent.items(), key=lambda item: -item[1])[:8])
    return Cost(seconds, server, reader, daemon, kernel, machine, busiest)


@contextlib.contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """A folder for the length of the block."""
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def through_mount(
    bucket: Bucket, work: Path, mode: str, names: tuple[str, ...], options: tuple[str, ...]
) -> Cost:
    """A fresh mount with an empty cache."""
    with empty_folder(work / "mount") as folder, Fusecache(options=options).mounted(bucket, folder) as mount:
        process = status(mount)["process"]
        pids = [int(process[name]) for name in ("pid", "keeper_pid") if process.get(name)]
        return measure(bucket, lambda: timed(mode, [mount / name for name in names]), lambda: pids)


def table_of(costs: dict[str, list[Cost]], size: int) -> Table:
    """Medians per contestant."""
    table = Table(title=f"cold load of {size / 1e9:.2f} GB, medians")
    for name in ("", "GB/s", "seconds", "CPU s: all", "server", "daemon", "in kernel", "reader"):
        table.add_column(name, justify="left" if not name else "right")
    for name, rounds in costs.items():
        if rounds:
            seconds = median(cost.seconds for cost in rounds)
            cells = [
                median(getattr(cost, part) for cost in rounds)
                for part in ("machine", "server", "daemon", "daemon_kernel", "reader")
            ]
            table.add_row(
                name, f"{size / 1e9 / seconds:.2f}", f"{seconds:.2f}", *(f"{cell:.2f}" for cell in cells)
            )
    return table


@click.command()
@click.option("--size", type=click.IntRange(1), default=512, show_default=True, help="MiB per shard.")
@click.option("--shards", type=click.IntRange(1, 16), default=4, show_default=True, help="Shards.")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Rounds.")
@click.option(
    "--mode",
    type=click.Choice(["parallel", "sequential", "safetensors"]),
    default="parallel",
    show_default=True,
    help="How the mount is read.",
)
@click.option("--engine", default="auto", show_default=True, help="Origin engine.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=16, show_default=True, help="Requests at once."
)
@click.option(
    "--range", "range_mib", type=click.IntRange(1), default=16, show_default=True, help="MiB per request."
)
@click.option("-o", "options", multiple=True, help="Further mount options.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/dev/shm"),
    show_default=True,
    help="Folder for the server's data and the cache.",
)
@click.option(
    "--json", "result", type=click.Path(dir_okay=False, path_type=Path), help="Write the samples here."
)
def main(
    size: int,
    shards: int,
    repeat: int,
    mode: str,
    engine: str,
    concurrency: int,
    range_mib: int,
    options: tuple[str, ...],
    work: Path,
    result: Path | None,
) -> None:
    """Take a cold load apart: s5cmd, the origin engine, the engine with a cache's writes, the mount."""
    end_cleanly_on_signals()
    clean_environment()
    console = Console()
    settings = (f"engine={engine}", f"concurrency={concurrency}", f"range_size={range_mib}MiB", *options)
    try:
        with tempfile.TemporaryDirectory(prefix="fcp.", dir=work, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            model = make_model(folder / "source", shards=shards, shard_mib=size)
            with s3_server(folder, "profile") as bucket:
                upload(bucket, model.directory)
                shutil.rmtree(model.directory)

                def stored() -> Cost:
                    with empty_folder(folder / "stored") as target:
                        return measure(
                            bucket, lambda: timed_engine(bucket, engine, concurrency, range_mib, target)
                        )

                contestants: dict[str, Callable[[], Cost]] = {
                    "s5cmd cp": lambda: measure(bucket, lambda: S5cmd().download(bucket, folder / "s5cmd")),
                    "engine alone": lambda: measure(
                        bucket, lambda: timed_engine(bucket, engine, concurrency, range_mib, None)
                    ),
                    "engine, written and hashed": stored,
                    f"mount, {mode}": lambda: through_mount(bucket, folder, mode, model.shards, settings),
                }
                costs = run_rounds(contestants, repeat, console)
    except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; everything was stopped and removed") from None
    console.print(table_of(costs, model.size))
    for cost in next(reversed(costs.values()))[-1:]:
        busiest = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in cost.threads.items())
        console.print(f"threads of the daemon in the last round: {busiest}", highlight=False, soft_wrap=True)
    if result is not None:
        document = {name: [asdict(cost) for cost in rounds] for name, rounds in costs.items()}
        result.write_text(json.dumps({"bytes": model.size, "costs": document}, indent=1) + "\n")


def run_rounds(
    contestants: dict[str, Callable[[], Cost]], repeat: int, console: Console
) -> dict[str, list[Cost]]:
    """All contestants in turn; one that fails is named and left out from then on."""
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    failed: set[str] = set()
    names = list(contestants)
    for number in range(repeat):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in failed:
                continue
            try:
                costs[name].append(contestants[name]())
            except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                failed.add(name)
                console.print(f"[red]problem:[/] {name}: {error}", highlight=False)
    return costs


if __name__ == "__main__":
    main()
