"""`fusecache trace` on a real mount: what real readers do is told, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusecache_mount.lifecycle import fuse_mount
from tests.support.live import HANG, asked, kill_daemon, status
from tests.support.mounting import RealMount, failing, mounted, needs_fuse
from tests.support.servers import wait_until

pytestmark = needs_fuse

SHARDS = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
PAGE = 4096
TENSOR = 1 << 20


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMount]:
    """Everything is in its cache, and was opened with passthrough if that is possible here."""
    work = tmp_path_factory.mktemp("trace")
    source = work / "source" / "llama"
    source.mkdir(parents=True)
    for number, shard in enumerate(SHARDS):
        tensors = {f"layer.{number}.{n}": np.full(TENSOR // 4, n, np.float32) for n in range(4)}
        save_file(tensors, source / shard)
    (source / "config.json").write_text("{}")
    with mounted(f"file://{work / 'source'}", work) as mount:
        for file in sorted((mount.path / "llama").iterdir()):
            file.read_bytes()
        yield mount


def trace(
    mount: RealMount, *options: str, run: Sequence[str] = (), code: int = 0
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a command's own processes, and the summary."""
    output = mount.path.parent / "trace.json"
    done = mount.command(
        "trace", str(mount.path), "--json", "--output", str(output), *options, "--", *run, check=False
    )
    assert done.returncode == code, done.stderr
    *events, summary = [json.loads(line) for line in output.read_text().splitlines()]
    assert summary.pop("op") == "summary"
    assert summary["lost"] == 0
    return [event for event in events if event["comm"] != "fusecache"], summary


def script(text: str, mount: RealMount | None = None) -> list[str]:
    """A Python program; with a mount, it may ask `told_mapped(*paths)`: has the trace told of these mappings?"""
    program = textwrap.dedent(text)
    if mount is not None:
        program = (
            textwrap.dedent(f"""
            import os
            def told_mapped(*paths):
                with open({str(mount.path.parent / "trace.json")!r}) as told:
                    maps = [line for line in told if '"map"' in line]
                return all(any(os.path.basename(path) in line for line in maps) for path in paths)
        """)
            + program
        )
    return [sys.executable, "-c", program]


def file_of(summary: dict[str, Any], path: str) -> dict[str, Any]:
    (found,) = [file for program in summary["programs"] for file in program["files"] if file["path"] == path]
    return dict(found)


def ops(events: list[dict[str, Any]], path: str) -> list[str]:
    return [event["op"] for event in events if event["path"] == path]


def serves_as_before(mount: RealMount) -> bool:
    """Whether an open is one with passthrough (where it is to be had), and the kernel refuses writes."""
    before = status(mount)
    (mount.path / "llama" / SHARDS[0]).read_bytes()
    passed = status(mount)["opens"]["passthrough"] - before["opens"]["passthrough"]
    return passed == (before["mode"]["now"] == "passthrough") and not fuse_mount.is_writable(mount.path)


def test_a_load_of_safetensors(mount: RealMount) -> None:
    paths = [str(mount.path / "llama" / shard) for shard in SHARDS]
    events, summary = trace(
        mount,
        run=script(
            f"""
            import time
            from contextlib import ExitStack
            from safetensors import safe_open
            with ExitStack() as held:
                for path in {paths!r}:
                    file = held.enter_context(safe_open(path, framework="numpy"))
                    assert len([file.get_tensor(name) for name in file.keys()]) == 4
                while not told_mapped(*{paths!r}):  # a mapping is looked at after its reads, if it is still there
                    time.sleep(0.01)
        """,
            mount,
        ),
    )
    (program,) = summary["programs"]
    assert program["names"][0].startswith("python")
    assert [file["path"] for file in program["files"]] == [f"llama/{shard}" for shard in SHARDS]
    for shard in SHARDS:
        path = f"llama/{shard}"
        found = ops(events, path)
        assert found.index("lookup") < found.index("open") < found.index("read")
        assert "release" in found
        (opened,) = [event for event in events if event["op"] == "open" and event["path"] == path]
        size = os.stat(mount.path / path).st_size
        assert (opened["by"], opened["flags"], opened["length"]) == ("daemon", "O_RDONLY", size)
        file = file_of(summary, path)
        assert (file["opens"], file["share"], file["mapped"] > 0) == (1, 1.0, True)
        assert all(event["pid"] == program["pid"] for event in events if event["op"] == "read")
    assert serves_as_before(mount)


def test_the_pages_that_a_mapping_touches(mount: RealMount) -> None:
    pages = [700, 3, 512, 90]
    events, summary = trace(
        mount,
        "--exact",
        run=script(
            f"""
            import mmap, os, time
            fd = os.open({str(mount.path / "llama" / SHARDS[1])!r}, os.O_RDONLY)
            mapped = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
            os.close(fd)
            sum(mapped[page * {PAGE}] for page in {pages})
            while not told_mapped({SHARDS[1]!r}):  # a mapping is looked at after its reads
                time.sleep(0.01)
        """,
            mount,
        ),
    )
    path = f"llama/{SHARDS[1]}"
    reads = [event for event in events if event["op"] == "read" and event["path"] == path]
    reads.sort(key=lambda event: event["id"])
    assert [(event["offset"], event["size"]) for event in reads] == [(page * PAGE, PAGE) for page in pages]
    file = file_of(summary, path)
    assert (file["reads"], file["mapped"] > 0, file["pattern"]) == (4, True, "random")
    assert file["share"] == pytest.approx(4 * PAGE / file["length"], abs=1e-4)
    read_ahead = Path(f"/sys/class/bdi/{fuse_mount.device_number_of(mount.path)}/read_ahead_kb")
    assert int(read_ahead.read_text()) > 0


def test_probes_are_seen_though_the_kernel_knew_the_answer(mount: RealMount) -> None:
    missing = mount.path / "llama" / "adapter_config.json"
    assert failing(missing.read_bytes) == "ENOENT"
    events, summary = trace(
        mount,
        run=script(f"""
            import os
            for _ in range(3):
                assert not os.path.exists({str(missing)!r})
            os.stat({str(mount.path / "llama" / "config.json")!r})
            os.listdir({str(mount.path / "llama")!r})
            os.statvfs({str(mount.path)!r})
        """),
    )
    (program,) = summary["programs"]
    assert program["missing"] == [{"path": "llama/adapter_config.json", "count": 3}]
    assert {"path": "llama/config.json", "count": 1} in program["looked_at"]
    assert program["files"] == []
    probes = [event for event in events if event["path"] == "llama/adapter_config.json"]
    assert {(event["op"], event["error"]) for event in probes} == {("lookup", "ENOENT")}
    assert {"opendir", "readdir"} <= set(ops(events, "llama"))
    assert "statfs" in ops(events, ".")


WRITER = """
    import errno, os
    for path, flags in (({new!r}, os.O_CREAT | os.O_WRONLY), ({old!r}, os.O_WRONLY)):
        try:
            os.open(path, flags)
        except OSError as error:
            assert error.errno == errno.EROFS
        else:
            raise AssertionError(path)
"""


def test_attempts_to_write(mount: RealMount) -> None:
    if os.geteuid():
        pytest.skip("only root may remount")
    writer = script(WRITER.format(new=str(mount.path / "new"), old=str(mount.path / "llama/config.json")))
    events, summary = trace(mount, "--writes", run=writer)
    (program,) = summary["programs"]
    assert program["failed"] == [
        {"op": "create", "path": "new", "error": "EROFS", "count": 1},
        {"op": "open", "path": "llama/config.json", "error": "EROFS", "count": 1},
    ]
    (create,) = [event for event in events if event["op"] == "create"]
    assert create["flags"] == "O_WRONLY|O_CREAT"
    assert serves_as_before(mount)
    # the kernel refuses by itself otherwise: all that is seen is the name that was looked up
    events, _ = trace(mount, run=writer)
    assert set(ops(events, "new")) == set(ops(events, "llama/config.json")) == {"lookup"}


def test_the_exit_code_is_that_of_the_command(mount: RealMount) -> None:
    trace(mount, run=["sh", "-c", "exit 7"], code=7)
    trace(mount, run=["sh", "-c", "kill -TERM $$"], code=128 + signal.SIGTERM)
    done = mount.command("trace", str(mount.path), "--", "/no/such/program", check=False)
    assert (done.returncode, done.stderr) == (2, "fusecache: /no/such/program: No such file or directory\n")


def begin(mount: RealMount, *options: str) -> subprocess.Popen[str]:
    """A trace that is running."""
    running = subprocess.Popen(
        [sys.executable, "-m", "fusecache.cli.main", "trace", str(mount.path), *options],
        env=dict(mount.env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: asked(mount, "status")["tracing"], "the trace to begin", HANG)
    except BaseException:
        running.kill()
        running.wait()
        raise
    return running


def test_ctrl_c_ends_it_with_the_summary(mount: RealMount) -> None:
    with begin(mount) as running:
        (mount.path / "llama" / "config.json").read_bytes()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=HANG)
    assert running.returncode == 0, err
    assert "open llama/config.json O_RDONLY" in out
    assert f"[{os.getpid()}], from" in out
    assert serves_as_before(mount)


def test_a_second_trace_is_refused(mount: RealMount) -> None:
    with begin(mount) as running:
        done = mount.command("trace", str(mount.path), check=False)
        assert done.returncode == 1
        assert done.stderr == (
            f"fusecache: {mount.path}: a trace of this mount is running already: end that one first\n"
        )
        running.kill()
        running.communicate(timeout=HANG)


def test_a_client_that_is_killed_leaves_nothing_behind(mount: RealMount) -> None:
    options = ["--exact", *(["--writes"] if os.geteuid() == 0 else [])]
    with begin(mount, *options) as running:
        running.kill()
        running.communicate(timeout=HANG)
    wait_until(lambda: serves_as_before(mount), "the mount to serve as before", HANG)
    events, _ = trace(mount, run=["true"])
    assert events == []


def test_a_daemon_that_is_killed_ends_the_trace(mount: RealMount) -> None:
    options = ["--writes"] if os.geteuid() == 0 else []
    with begin(mount, *options) as running:
        (mount.path / "llama" / "config.json").read_bytes()
        kill_daemon(mount)
        out, err = running.communicate(timeout=HANG)
    assert running.returncode == 1
    assert "the trace ends here" in err
    assert "Traceback" not in err
    assert "requests in" in out
    wait_until(
        lambda: mount.command("status", str(mount.path), check=False).returncode == 0, "a daemon", HANG
    )
    wait_until(lambda: serves_as_before(mount), "the mount to serve as before", HANG)
