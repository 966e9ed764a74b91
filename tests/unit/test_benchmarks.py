"""The measuring itself: turns, medians, verdicts, the counting relay, the model, the readers."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks import measure, profile_cold
from benchmarks.measure import drop_page_cache, interleave, median, ratios, usage_of
from benchmarks.model import make_model
from benchmarks.processes import (
    BenchmarkError,
    answers,
    clean_environment,
    free_port,
    is_mounted,
    mounts_below,
    run,
    running,
    stop,
)
from benchmarks.proxy import MARK, counting_relay
from benchmarks.readers import timed
from benchmarks.report import Report, Row, file_system_of
from benchmarks.tools import Bucket
from benchmarks.tools.fusecache import store_files


def test_every_contestant_has_its_turn_in_a_rotating_order() -> None:
    order: list[str] = []
    before: list[int] = []

    def contestant(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    times = interleave(
        {"a": lambda: contestant("a", 1.0), "b": lambda: contestant("b", 2.0)},
        3,
        before=lambda: before.append(len(order)),
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert before == [0, 1, 2, 3, 4, 5]
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_ratios_are_of_neighbours() -> None:
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == [2.0, 3.0, 1.0]
    assert median([2.0, 3.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("samples", "lower", "verdict"),
    [
        ([1.0], False, "aim"),
        ([0.96], False, "ok"),
        ([0.94, 0.94, 1.0], False, "missed"),
        ([], False, "failed"),
        ([0.9], True, "aim"),
        ([0.98], True, "missed"),
    ],
)
def test_verdicts(samples: list[float], lower: bool, verdict: str) -> None:
    target, aim = (0.95, 0.90) if lower else (0.95, 1.0)
    assert Row("key", "title", samples, target, aim, lower).verdict == verdict


def test_report_is_valid_json_also_with_a_row_that_failed(tmp_path: Path) -> None:
    report = Report({"rounds": 1}, rows=[Row("a", "a", [1.0], 1, 1), Row("b", "b", [], 1, 1)])
    report.write(tmp_path / "deep" / "report.json")
    rows = json.loads((tmp_path / "deep" / "report.json").read_text())["rows"]
    assert [(row["value"], row["verdict"]) for row in rows] == [(1.0, "aim"), (None, "failed")]
    assert report.failed()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_the_plot_shows_whoever_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report({"rounds": 1})
    report.plot(tmp_path / "none.png", 10**9)
    report.seconds["cold-parallel"] = {"fusecache": [1.0, 1.1], "s5cmd": [1.0], "rclone": []}
    report.seconds["warm-raw-sequential"] = {"mount": [0.1], "raw": [0.1]}
    report.plot(tmp_path / "plot.png", 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_file_system_of_the_innermost_mount(tmp_path: Path) -> None:
    assert file_system_of(Path("/proc/self")) == "proc"
    assert file_system_of(tmp_path) not in ("?", "proc")
    assert is_mounted(Path("/proc"))
    assert not is_mounted(tmp_path)
    assert mounts_below(tmp_path) == []


def test_model_is_the_same_for_one_seed_and_has_a_true_index(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", shards=2, shard_mib=1)
    again = make_model(tmp_path / "b", shards=2, shard_mib=1)
    assert model.sha256 == again.sha256
    assert make_model(tmp_path / "c", shards=2, shard_mib=1, seed=1).sha256 != model.sha256
    assert model.sha256[model.shards[0]] != model.sha256[model.shards[1]]
    assert model.size == sum((tmp_path / "a" / name).stat().st_size for name in model.shards)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    for shard in model.shards:
        with safe_open(tmp_path / "a" / shard, framework="numpy") as handle:
            names = {name for name, file in index["weight_map"].items() if file == shard}
            assert set(handle.keys()) == names


@pytest.mark.parametrize("mode", ["sequential", "parallel", "crowd", "safetensors"])
def test_readers_read_everything(tmp_path: Path, mode: str) -> None:
    model = make_model(tmp_path, shards=2, shard_mib=1)
    assert timed(mode, [tmp_path / name for name in model.shards], 60) > 0


def test_a_reader_that_fails_is_one_error_of_one_line_at_least(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="No such file"):
        timed("sequential", [tmp_path / "missing"], 60)


def test_run_tells_how_a_command_ended() -> None:
    assert run(["echo", "a"], timeout=10) == "a\n"
    with pytest.raises(BenchmarkError, match=r"^sh exited with 3: why$"):
        run(["sh", "-c", "echo why >&2; exit 3"], timeout=10)
    with pytest.raises(BenchmarkError, match=r"^python3? exited with 1: ZeroDivisionError: .*zero$"):
        run(["python3", "-c", "1 / 0"], timeout=30)
    with pytest.raises(BenchmarkError, match="no end within"):
        run(["sleep", "60"], timeout=0.05)


def test_a_server_that_ignores_terminate_is_gone_with_its_children(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 600 & echo $!; wait; wait"
    with running(["sh", "-c", script], tmp_path / "log") as process:
        while not (tmp_path / "log").read_text().endswith("\n"):
            assert process.poll() is None
        child = int((tmp_path / "log").read_text())
        assert Path(f"/proc/{child}").exists()
        stop(process, grace=0.05)
    assert process.returncode == -signal.SIGKILL
    # Orphans of a killed group are reaped by init at its leisure: dead is enough.
    stat = Path(f"/proc/{child}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        pass


def test_usage_of_this_process() -> None:
    usage = usage_of(os.getpid())
    assert usage.cpu_seconds > 0
    assert usage.rss_peak > 1 << 20


def test_cpu_time_is_told_by_who_spent_it() -> None:
    bucket = Bucket("http://h", "a", "s", "b", "p", os.getpid())

    def load() -> float:
        run([sys.executable, "-c", "sum(range(10_000_000))"], timeout=60)
        return 1.5

    cost = profile_cold.measure(bucket, load, lambda: [os.getpid()])
    assert cost.seconds == 1.5
    assert cost.reader > 0
    assert cost.machine > 0
    assert sum(cost.threads.values()) <= cost.daemon + 0.1
    assert profile_cold.table_of({"a": [cost], "b": []}, 10**9).row_count == 1


def test_dropping_the_cache_keeps_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DROP_CACHES", tmp_path / "drop_caches")  # the machine's own stays warm
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100_000)
    assert drop_page_cache([file]) == "posix_fadvise(DONTNEED) and drop_caches"
    monkeypatch.setattr(measure, "DROP_CACHES", tmp_path / "missing" / "drop_caches")
    assert drop_page_cache([file]) == "posix_fadvise(DONTNEED)"
    assert file.read_bytes() == b"x" * 100_000


def test_ports() -> None:
    port = free_port(with_grpc=True)
    assert 1024 < port <= 65535 - 10000
    assert not answers(port)


def test_the_environment_of_the_user_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.update(
        AWS_PROFILE="p", AWS_ENDPOINT_URL="u", FUSECACHE_CACHE_DIR="c", https_proxy="x", OTHER="kept"
    )
    os.environ["FUSECACHE_TEST_RUN"] = "kept"
    clean_environment()
    assert not {"AWS_PROFILE", "AWS_ENDPOINT_URL", "FUSECACHE_CACHE_DIR", "https_proxy"} & set(os.environ)
    assert os.environ["OTHER"] == os.environ["FUSECACHE_TEST_RUN"] == "kept"


def test_bucket_urls() -> None:
    assert Bucket("http://h", "a", "s", "b", "p").url == "s3://b/p"
    assert Bucket("http://h", "a", "s", "b", "").url == "s3://b"
    assert "s" in Bucket("http://h", "a", "s", "b", "p").environment.values()


def test_store_files_are_found_by_size_and_each_once(tmp_path: Path) -> None:
    for name, size in (("a", 5), ("b", 5), ("c", 7)):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "data").write_bytes(b"x" * size)
    assert len(set(store_files(tmp_path, [5, 5, 7]))) == 3
    with pytest.raises(BenchmarkError, match="no file of 7 bytes"):
        store_files(tmp_path, [7, 7])


class _Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_relay_counts_listings_only(web: str) -> None:
    with counting_relay(web) as relay:
        for path in ("/b?list-type=2", "/b/key", "/b?prefix=a&list-type=2&max-keys=1"):
            with urllib.request.urlopen(relay.endpoint + path, timeout=10) as answer:
                assert answer.read() == b"ok"
        assert relay.lists == 2


def test_a_mark_in_two_halves_counts_once(web: str) -> None:
    import socket

    with counting_relay(web) as relay:
        host, port = relay.endpoint.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"GET /b?" + MARK + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n":
                connection.sendall(bytes([byte]))
            while connection.recv(4096):
                pass
        assert relay.lists == 1


@pytest.mark.parametrize("module", ["single_node", "profile_cold", "demo"])
def test_help_needs_no_server(module: str) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", f"benchmarks.{module}", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert "--shards" in done.stdout


def test_an_unknown_stage_is_named() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks.single_node", "--only", "wram"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "wram" in done.stderr
    assert "Traceback" not in done.stderr
