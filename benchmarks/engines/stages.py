"""The stages of the measurement. Each stage notes its rounds in the results; a contestant that fails is
named there and left out from then on."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines import engine
from benchmarks.engines.formats import make_format, make_llama
from benchmarks.engines.loaders import LOADERS, missing, timed
from benchmarks.engines.results import US, Measurement, Results
from benchmarks.engines.site import Busy, Site
from benchmarks.measure import drop_page_cache
from benchmarks.model import sha256_of
from benchmarks.processes import BenchmarkError, wait_until
from benchmarks.readers import timed as read_plainly
from benchmarks.tools import Bucket, Tool
from benchmarks.tools.fusecache import Fusecache, status, store_files
from benchmarks.tools.s5cmd import S5cmd

Contestants = dict[str, Callable[[int], None]]
"""Name -> one round, told its number."""
FAILURES = (BenchmarkError, OSError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Upload:
    """A model in the bucket, and what is known of it."""

    bucket: Bucket
    bytes: int
    """Of its shards."""
    tensors: int
    """Bytes of its tensors, of the safetensors format."""
    shards: tuple[str, ...]
    digests: Mapping[str, str]
    tools: Mapping[str, Tool]
    """The other tools, made ready for it."""
    tokens: tuple[int, ...] = ()
    """The first text of vLLM with the model on the local disk."""


@dataclass
class Setting:
    """Settings that all stages share; `tick` gets a line for each step. Sizes in MiB, `rate` in bytes per second."""

    site: Site
    results: Results
    tick: Callable[[str], None]
    rounds: int
    rate: float
    shards: int
    shard_mib: int
    engine_mib: int
    loaders: Sequence[str]
    tools: Mapping[str, Callable[[], Tool]]
    python: str
    """The interpreter that has vLLM."""
    uploads: dict[str, Upload] = field(default_factory=dict)

    def settings(self, upload: Upload, **more: Any) -> dict[str, Any]:
        """The settings that rounds must have in common to be compared."""
        return {"bytes": upload.bytes, "shards": len(upload.shards), **more}

    def upload(self, kind: str, *, tools: bool = False) -> Upload:
        """The model of this kind in the bucket: 'safetensors', 'pt', 'gguf' or 'llama'. `tools`: for them, too."""
        if kind not in self.uploads:
            self.tick(f"making and uploading the {kind} model")
            self.uploads[kind] = self._make(kind, tools)
        return self.uploads[kind]

    def _make(self, kind: str, tools: bool) -> Upload:
        source = self.site.work / "source"
        bucket = dataclasses.replace(self.site.bucket, prefix=kind)
        tokens: tuple[int, ...] = ()
        try:
            if kind == "llama":
                size = make_llama(source, shards=self.shards, mib=self.engine_mib)
                # The first start ever also fills vLLM's cache of what it knows of the architecture.
                self.tick("a first vLLM start, from the local disk")
                tokens = engine.start(self.python, source, self.site.work, time.monotonic()).tokens
            else:
                size = make_format(kind, source, shards=self.shards, shard_mib=self.shard_mib)
            files = sorted(source.iterdir())
            weights = [file for file in files if file.suffix != ".json"]
            S5cmd().upload(source, bucket, kind)
            return Upload(
                bucket,
                size,
                sum(map(tensor_bytes, weights)) if kind in ("safetensors", "llama") else 0,
                tuple(file.name for file in weights),
                {file.name: sha256_of(file) for file in files},
                self._prepared(kind, bucket, source) if tools else {},
                tokens,
            )
        finally:
            shutil.rmtree(source, ignore_errors=True)

    def _prepared(self, kind: str, bucket: Bucket, source: Path) -> dict[str, Tool]:
        ready: dict[str, Tool] = {}
        for name, make in self.tools.items():
            tool = make()
            self.tick(f"preparing {name}")
            home = self.site.work / f"{kind}-{name}"
            home.mkdir()
            try:
                tool.prepare(bucket, source, home)
                self.results.versions[name] = tool.version()
                self.results.options[name] = list(tool.settings())
                ready[name] = tool
            except FAILURES as error:
                self.results.problem("tools", f"{name}: {error}")
        return ready

    def take_turns(self, stage: str, contestants: Contestants) -> None:
        """All rounds, in an order that rotates."""
        names = list(contestants)
        failed: set[str] = set()
        for number in range(self.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                if name in failed:
                    continue
                drop_page_cache(())
                try:
                    contestants[name](number)
                except FAILURES as error:
                    self.results.problem(stage, f"{name}: {error}")
                    failed.add(name)
                    self.tick(f"{stage}: {name}, round {number + 1}: failed")

    def note(self, found: Measurement, number: int, name: str, seconds: float, busy: Busy) -> None:
        """One contestant's round, and say so."""
        found.note(number, name, seconds, busy.share())
        key = next(key for key, known in self.results.measurements.items() if known is found)
        bound = f", {seconds / found.bound:.3f} of the bound" if found.settings.get("rate") else ""
        self.tick(f"{key}: {name}, round {number + 1}: {seconds:.2f} s{bound}")


def tensor_bytes(file: Path) -> int:
    """Bytes of the tensors of a safetensors file."""
    with file.open("rb") as opened:
        (header,) = struct.unpack("<Q", opened.read(8))
    return file.stat().st_size - 8 - int(header)


def cold(setting: Setting, ranks: int) -> None:
    """The network is the bound: every mount loads the whole model with an empty cache, and then once more."""
    name = "cold" if ranks == 1 else "ranks"
    upload = setting.upload("safetensors", tools=True)
    settings = setting.settings(upload, rate=setting.rate)
    found = setting.results.measurement(name, settings)
    again = setting.results.measurement("again", setting.settings(upload)) if ranks == 1 else None

    def through(tool: Tool, number: int) -> None:
        with setting.site.folder("mount") as work, tool.mounted(upload.bucket, work) as folder:
            busy = Busy()
            seconds, loaded = timed("safetensors", folder, ranks=ranks)
            setting.note(found, number, tool.name, seconds, busy)
            if loaded != upload.tensors:
                raise BenchmarkError(f"loaded {loaded} of {upload.tensors} bytes")
            if tool.name == US:
                found.facts["opens"] = status(folder)["opens"]
            if again is not None:
                # Once more, untimed: a cache may still lack what its writer dropped or had not yet finished.
                timed("safetensors", folder)
                drop_page_cache([folder / shard for shard in upload.shards])
                busy = Busy()
                seconds, _ = timed("safetensors", folder)
                setting.note(again, number, tool.name, seconds, busy)
            if number == 0:
                _verify(upload, folder)

    def downloaded(number: int) -> None:
        busy = Busy()
        setting.note(
            found, number, "s5cmd", S5cmd().download(upload.bucket, setting.site.work / "copy"), busy
        )

    contestants: Contestants = {US: lambda number: through(Fusecache(), number), "s5cmd": downloaded}
    for tool in upload.tools.values():
        contestants[tool.name] = lambda number, tool=tool: through(tool, number)  # type: ignore[misc]
    with setting.site.on_node(setting.rate):
        setting.take_turns(name, contestants)


def _verify(upload: Upload, folder: Path) -> None:
    wrong = [name for name, digest in upload.digests.items() if sha256_of(folder / name) != digest]
    if wrong:
        raise BenchmarkError(f"wrong bytes in {', '.join(wrong)}")


def learned(setting: Setting) -> None:
    """A cold load that reads a part of the tensors, after one whose order was learned, and the same without."""
    upload = setting.upload("safetensors")
    found = setting.results.measurement("learned", setting.settings(upload, rate=setting.rate))

    def load(number: int, name: str, tool: Fusecache, work: Path) -> None:
        with tool.mounted(upload.bucket, work) as folder:
            busy = Busy()
            seconds, _ = timed("sparse", folder)
            setting.note(found, number, name, seconds, busy)

    def plain(number: int) -> None:
        with setting.site.folder("mount") as work:
            load(number, "plain", Fusecache(options=("learn=off",)), work)

    def after_another(number: int) -> None:
        with setting.site.folder("mount") as work:
            with Fusecache().mounted(upload.bucket, work) as folder:
                timed("sparse", folder)
            _keep_orders(work / "cache")
            load(number, "learned", Fusecache(), work)

    with setting.site.on_node(setting.rate):
        setting.take_turns("learned", {"learned": after_another, "plain": plain})


def _keep_orders(cache: Path) -> None:
    """Let go of all that is cached but the recordings."""
    if not list((cache / "orders").glob("*.order")):
        raise BenchmarkError("no order was learned")
    for path in cache.iterdir():
        if path.is_dir() and path.name != "orders":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    drop_page_cache(())


def warm(setting: Setting) -> None:
    """Each loader from a full cache, against the same from the cache's own files."""
    for kind in dict.fromkeys(LOADERS[name][1] for name in setting.loaders):
        names = [name for name in setting.loaders if LOADERS[name][1] == kind]
        for name in [name for name in names if missing(name)]:
            setting.results.problem("warm", f"{name}: {missing(name)} is not installed")
            names.remove(name)
        if names:
            _warm(setting, setting.upload(kind), names)


def _warm(setting: Setting, upload: Upload, names: Sequence[str]) -> None:
    with (
        setting.site.on_node(None),
        setting.site.folder("mount") as work,
        Fusecache().mounted(upload.bucket, work) as mount,
    ):
        setting.tick("filling the cache")
        through = [mount / shard for shard in upload.shards]
        sizes = [file.stat().st_size for file in through]
        read_plainly("sequential", through)
        wait_until(
            lambda: int(status(mount)["cache"]["objects_complete"]) >= len(through), "complete objects", 60
        )
        local = work / "local"
        local.mkdir()
        for shard, file in zip(upload.shards, store_files(work, sizes), strict=True):
            (local / shard).symlink_to(file)
        for index in mount.glob("*.index.json"):
            shutil.copyfile(index, local / index.name)
        for name in names:
            found = setting.results.measurement(f"warm-{name}", setting.settings(upload))

            def load(
                number: int, where: str, folder: Path, name: str = name, found: Measurement = found
            ) -> None:
                drop_page_cache([folder / shard for shard in upload.shards])
                busy = Busy()
                seconds, _ = timed(name, folder)
                setting.note(found, number, where, seconds, busy)

            setting.take_turns(
                "warm",
                {
                    US: lambda number, load=load: load(number, US, mount),  # type: ignore[misc]
                    "local": lambda number, load=load: load(number, "local", local),  # type: ignore[misc]
                },
            )
            found.facts["opens"] = status(mount)["opens"]


def vllm(setting: Setting) -> None:
    """From the start of vLLM's process on a mount with an empty cache, or of s5cmd before it, to the first token."""
    setting.results.versions["vllm"] = engine.version(setting.python)
    upload = setting.upload("llama", tools=True)
    found = setting.results.measurement("vllm", setting.settings(upload, rate=setting.rate))

    def begin(number: int, name: str, folder: Path, began: float, busy: Busy) -> None:
        started = engine.start(setting.python, folder, setting.site.work, began)
        setting.note(found, number, name, started.token, busy)
        if started.tokens != upload.tokens:
            raise BenchmarkError(f"other tokens than from the local disk: {started.tokens}")
        phases = found.facts.setdefault("phases", {}).setdefault(name, [])
        phases.append({"imported": started.imported, "ready": started.ready, "token": started.token})

    def through(tool: Tool, number: int) -> None:
        with setting.site.folder("mount") as work, tool.mounted(upload.bucket, work) as folder:
            begin(number, tool.name, folder, time.monotonic(), Busy())

    def downloaded(number: int) -> None:
        with setting.site.folder("copy") as folder:
            busy, began = Busy(), time.monotonic()
            S5cmd().fetch(upload.bucket, folder)
            found.facts.setdefault("download", []).append(time.monotonic() - began)
            begin(number, "s5cmd", folder, began, busy)

    contestants: Contestants = {US: lambda number: through(Fusecache(), number), "s5cmd": downloaded}
    for tool in upload.tools.values():
        contestants[tool.name] = lambda number, tool=tool: through(tool, number)  # type: ignore[misc]
    with setting.site.on_node(setting.rate):
        setting.take_turns("vllm", contestants)


STAGES: dict[str, Callable[[Setting], None]] = {
    "cold": lambda setting: cold(setting, 1),
    "ranks": lambda setting: cold(setting, 2),
    "learned": learned,
    "warm": warm,
    "vllm": vllm,
}


@contextlib.contextmanager
def told(setting: Setting, stage: str) -> Iterator[None]:
    """A stage that fails as a whole is one problem, not the end of the run."""
    try:
        yield
    except FAILURES as error:
        setting.results.problem(stage, str(error))
