"""The demo as a user runs it: a real server, a real mount, a real loader; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.demo import PREFIX
from benchmarks.processes import mounts_below

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--size", "4", "--shards", "2")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo, started in a session of its own with its files below tmp_path (or /dev/shm: see demo.choose)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.demo", *SMALL],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)


def _left(pid: int, tmp_path: Path) -> list[Path]:
    """Files and mounts of this run."""
    folders = (tmp_path, Path("/var/tmp"), Path("/dev/shm"))
    found = [left for folder in folders for left in folder.glob(f"{PREFIX}{pid}.*")]
    return found + [
        mount for folder in folders for mount in mounts_below(folder) if f"{PREFIX}{pid}." in str(mount)
    ]


def test_it_loads_a_model_cold_and_warm(start: subprocess.Popen[str], tmp_path: Path) -> None:
    output, _ = start.communicate(timeout=110)
    assert start.returncode == 0, output
    assert "every byte of 4 files is right" in output
    assert "mode: passthrough" in output or "mode: daemon" in output
    assert "100% S3" in output
    assert _left(start.pid, tmp_path) == []


def test_ctrl_c_leaves_nothing(start: subprocess.Popen[str], tmp_path: Path) -> None:
    assert start.stdout is not None
    for line in start.stdout:
        if "loading it cold" in line:
            break
    start.send_signal(signal.SIGINT)
    output, _ = start.communicate(timeout=60)
    assert start.returncode == 1, output
    assert "interrupted" in output
    assert _left(start.pid, tmp_path) == []
