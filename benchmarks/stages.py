"""The measurements of one node, each a stage that adds its rows to the report.

A contestant that fails is named in the report and left out; it never takes the run down with it.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import drop_page_cache, interleave, median, ratios, usage_of
from benchmarks.model import Model, sha256_of
from benchmarks.processes import BenchmarkError, run, wait_until
from benchmarks.proxy import counting_relay
from benchmarks.readers import random_reads, timed
from benchmarks.report import Report, Row
from benchmarks.tools import Bucket, Tool
from benchmarks.tools.fusecache import Fusecache, status, store_files
from benchmarks.tools.s5cmd import S5cmd

GB = 1e9
RANDOM_READS = 200_000  # about a second: fio's own start does not count
DAEMON = "fusecache-daemon"


@dataclass(frozen=True)
class Setting:
    """Settings that all stages share; `tick` gets a line for each step."""

    bucket: Bucket
    model: Model
    sizes: Sequence[int]
    """Bytes per shard."""
    work: Path
    repeat: int
    report: Report
    tick: Callable[[str], None]

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """An empty folder for one mount and its cache, gone after the block."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def add(self, row: Row) -> None:
        """Add a row."""
        self.report.rows.append(row)


def warm(setting: Setting) -> None:
    """Mount against the raw files of its own store, and the daemon's CPU time meanwhile."""
    with setting.folder("warm") as work, Fusecache().mounted(setting.bucket, work) as mount:
        through = [mount / name for name in setting.model.shards]
        setting.tick("filling the cache")
        timed("parallel", through)
        wait_until(
            lambda: int(status(mount)["cache"]["objects_complete"]) >= len(through),
            "complete objects in the cache",
            120,
        )
        raw = store_files(work, setting.sizes)
        timed("sequential", through)

        def before() -> None:
            setting.report.facts["page_cache"] = drop_page_cache([*through, *raw])

        readers: Mapping[str, tuple[str, float, Callable[[Sequence[Path]], float]]] = {
            "sequential": ("sequential 4 MiB reads", 0.95, lambda files: timed("sequential", files)),
            "safetensors": ("safetensors, every tensor", 0.95, lambda files: timed("safetensors", files)),
            "random": ("4 KiB random pread", 0.80, lambda files: random_reads(files, RANDOM_READS)),
            "crowd": ("8 processes, same shards", 0.95, lambda files: timed("crowd", files)),
        }
        for key, (title, target, read) in readers.items():
            times = interleave(
                {"mount": lambda read=read: read(through), "raw": lambda read=read: read(raw)},  # type: ignore[misc]
                setting.repeat,
                before=before,
                progress=lambda text, title=title: setting.tick(f"warm, {title}: {text}"),  # type: ignore[misc]
            )
            setting.report.seconds[f"warm-raw-{key}"] = times
            setting.add(
                Row(
                    f"warm-{key}",
                    f"warm, {title}: mount / raw file",
                    ratios(times["raw"], times["mount"]),
                    target,
                    0.95 if key == "random" else 1.0,
                )
            )
        _cpu(setting, mount, through, before)


def _cpu(setting: Setting, mount: Path, files: Sequence[Path], before: Callable[[], None]) -> None:
    found = status(mount)
    pids = {int(found["process"][name]) for name in ("pid", "keeper_pid") if found["process"].get(name)}
    samples = []
    passes = 5  # a tick of the CPU accounting is 10 ms: spread it over more bytes
    for number in range(setting.repeat):
        setting.tick(f"CPU of the daemon, round {number + 1} of {setting.repeat}")
        used = sum(usage_of(pid).cpu_seconds for pid in pids)
        for _ in range(passes):
            before()
            timed("sequential", files)
        spent = sum(usage_of(pid).cpu_seconds for pid in pids) - used
        samples.append(spent / (passes * setting.model.size / GB))
    mode = status(mount)["mode"]
    setting.report.facts["mode"] = mode
    setting.report.facts["opens"] = status(mount)["opens"]
    note = f"mode: {mode['now']}"
    setting.add(Row("cpu", "CPU of the daemon per GB, warm", samples, 0.01, 0.0, True, " s", note))


def against(setting: Setting, tools: Sequence[Tool]) -> None:
    """Cold and warm, every tool in turn, a fresh mount and an empty cache for each cold sample."""
    contestants: dict[str, Tool] = {tool.name: tool for tool in tools}
    contestants[DAEMON] = Fusecache(DAEMON, ("passthrough=off",))
    contestants["fusecache"] = Fusecache()
    seconds = setting.report.seconds
    for key in ("cold-parallel", "cold-sequential", "warm-sequential", "warm-parallel"):
        seconds[key] = {name: [] for name in ("fusecache", DAEMON, *(tool.name for tool in tools))}
    for key in ("cold-parallel", "cold-sequential"):
        seconds[key]["s5cmd"] = []
    names = ["fusecache", "s5cmd", *(tool.name for tool in tools), DAEMON]
    for number in range(setting.repeat):
        for cold_mode, warm_mode in (("parallel", "sequential"), ("sequential", "parallel")):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                setting.tick(f"cold ({cold_mode}) and warm: {name}, round {number + 1} of {setting.repeat}")
                drop_page_cache(())  # the server's own, with its data on a disk: the same start for all
                if name == "s5cmd":
                    took = S5cmd().download(setting.bucket, setting.work / "download")
                    seconds[f"cold-{cold_mode}"][name].append(took)
                elif name in contestants:
                    try:
                        cold, again = _cold_and_warm(
                            setting, contestants[name], cold_mode, warm_mode, number == 0
                        )
                        seconds[f"cold-{cold_mode}"][name].append(cold)
                        seconds[f"warm-{warm_mode}"][name].append(again)
                    except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                        setting.report.problems.append(f"{name}: {error}")
                        del contestants[name]
    _cold_rows(setting)
    for tool in tools:
        _tool_rows(setting, tool.name)
    if "juicefs" in (tool.name for tool in tools):
        for mode in ("sequential", "parallel"):
            samples = _paired(seconds[f"warm-{mode}"], "juicefs", DAEMON)
            title = f"warm ({mode}), daemon without passthrough / JuiceFS"
            setting.add(Row(f"daemon-{mode}", title, samples, 1.0, 2.0))


def _cold_and_warm(
    setting: Setting, tool: Tool, cold_mode: str, warm_mode: str, verify: bool
) -> tuple[float, float]:
    with setting.folder(f"against-{tool.name}") as work:
        started = time.perf_counter()
        with tool.mounted(setting.bucket, work) as folder:
            mounts: dict[str, list[float]] = setting.report.facts.setdefault("mount_seconds", {})
            mounts.setdefault(tool.name, []).append(time.perf_counter() - started)
            files = [folder / name for name in setting.model.shards]
            cold = timed(cold_mode, files)
            # Once more, untimed: a cache may still lack what its writer dropped or had not yet finished.
            timed("sequential", files)
            drop_page_cache(files)
            again = timed(warm_mode, files)
            if verify:
                wrong = [
                    name
                    for name, digest in setting.model.sha256.items()
                    if sha256_of(folder / name) != digest
                ]
                if wrong:
                    raise BenchmarkError(f"wrong bytes in {', '.join(wrong)}")
            return cold, again


def _paired(times: Mapping[str, Sequence[float]], above: str, below: str) -> list[float]:
    # A contestant that failed half way has fewer rounds.
    rounds = min(len(times.get(above, ())), len(times.get(below, ())))
    return ratios(times[above][:rounds], times[below][:rounds]) if rounds else []


def _cold_rows(setting: Setting) -> None:
    for mode, how in (("parallel", "shards at once"), ("sequential", "one shard after another")):
        times = setting.report.seconds[f"cold-{mode}"]
        samples = _paired(times, "fusecache", "s5cmd")
        setting.add(Row(f"cold-{mode}", f"cold, {how}: time / s5cmd cp", samples, 1.10, 1.0, True))


def _tool_rows(setting: Setting, name: str) -> None:
    for heat, aim in (("warm", 5.0), ("cold", 2.0)):
        for mode in ("sequential", "parallel"):
            samples = _paired(setting.report.seconds[f"{heat}-{mode}"], name, "fusecache")
            setting.add(
                Row(f"{heat}-{mode}-{name}", f"{heat} ({mode}): times as fast as {name}", samples, 1.0, aim)
            )


def listing(setting: Setting, objects: int) -> None:
    """LIST requests of `ls -lR`, counted on the wire."""
    prefix = "many"
    with setting.folder("many") as work:
        setting.tick(f"uploading {objects} small objects")
        for number in range(objects):
            path = work / "source" / f"{number // 100:03d}" / f"{number:06d}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(number.to_bytes(8, "big"))
        S5cmd().upload(work / "source", setting.bucket, prefix)
        shutil.rmtree(work / "source")
        with counting_relay(setting.bucket.endpoint) as relay:
            behind = replace(setting.bucket, endpoint=relay.endpoint, prefix=prefix)
            with Fusecache().mounted(behind, work) as mount:
                setting.tick("ls -lR")
                started = time.perf_counter()
                lines = run(["ls", "-lR", str(mount)], timeout=300).splitlines()
                took = time.perf_counter() - started
                files = sum(line.endswith(".bin") for line in lines)
                if files != objects:
                    raise BenchmarkError(f"ls -lR showed {files} of {objects} files")
                setting.report.facts["listing"] = {"objects": objects, "seconds": took, "lists": relay.lists}
        pages = math.ceil(objects / 1000)
        setting.add(
            Row("lists", f"LIST requests of ls -lR, {objects} objects", [relay.lists], pages, pages, True)
        )


def memory(setting: Setting) -> None:
    """Peak of the daemon's resident memory while 8 processes stream two copies of the model, cold."""
    setting.tick("copying the model")
    S5cmd().copy(setting.bucket, "copy")
    whole = replace(setting.bucket, prefix="")
    with setting.folder("memory") as work, Fusecache().mounted(whole, work) as mount:
        files = [mount / part / name for part in ("model", "copy") for name in setting.model.shards]
        pid = int(status(mount)["process"]["pid"])
        setting.tick("8 readers, cold")
        took = timed("parallel", files[:8])
        peak = usage_of(pid).rss_peak / (1 << 20)
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        now = {
            line.partition(":")[0]: line.partition(":")[2].strip()
            for line in lines
            if line.startswith(("Rss", "VmHWM"))
        }
        setting.report.facts["memory"] = {"seconds": took, **now}
        note = f"{int(now.get('RssAnon', '0').split()[0]) >> 10} MiB of it its own, not the cache's pages"
    S5cmd().remove(setting.bucket, "copy")
    streamed = 2 * setting.model.size / (1 << 30)
    title = f"peak memory of the daemon, 8 readers, {streamed:.2g} GiB cold"
    setting.add(Row("memory", title, [peak], 400, 250, True, " MiB", note))


def summary(setting: Setting) -> dict[str, dict[str, float]]:
    """Median GB/s per measurement and contestant, for the JSON."""
    return {
        key: {name: setting.model.size / GB / median(samples) for name, samples in times.items() if samples}
        for key, times in setting.report.seconds.items()
        if key.startswith(("cold", "warm-sequential", "warm-parallel"))
    }
