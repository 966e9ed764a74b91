"""Logs: one line per event, no secrets, repeats held back. Metrics: all of the status, over HTTP."""

from __future__ import annotations

import json
import logging
import stat
import urllib.request
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest

from fusecache.errors import ConfigError
from fusecache.telemetry.logs import (
    BURST_EVENTS,
    BURST_WINDOW_SECONDS,
    HANDLER_NAME,
    REDACTED,
    RepeatFilter,
    configure_logging,
)
from fusecache.telemetry.metrics import METRICS, StatusCollector
from fusecache.telemetry.server import MetricsServer

SECRET = "wJalr/XUt+n=FEMI"
_log = logging.getLogger("fusecache.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    before = (
        root.level,
        logging.raiseExceptions,
        {n: logging.getLogger(n).level for n in ("fusecache", "__main__")},
    )
    yield
    for handler in root.handlers[:]:
        if handler.get_name() == HANDLER_NAME:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(before[0])
    logging.raiseExceptions = before[1]
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def lines(format: Literal["text", "json"], level: Literal["debug", "info"] = "info") -> StringIO:
    stream = StringIO()
    configure_logging(level, format, stream=stream, secrets=[SECRET])
    return stream


def test_text_is_one_line_per_event() -> None:
    stream = lines("text")
    _log.info("fetched %s", "a\nb", extra={"bytes": 5, "key": "x y"})
    try:
        raise ValueError("broken\nbadly")
    except ValueError:
        _log.exception("read failed")
    first, second = stream.getvalue().splitlines()
    assert first.endswith('info    fusecache.test: fetched a\\nb bytes=5 key="x y"')
    assert "error    fusecache.test" not in second
    assert 'error="ValueError: broken\\\\nbadly"' in second
    assert "test_telemetry.py" in second


def test_json_is_one_object_per_event() -> None:
    stream = lines("json")
    _log.warning("fetched %s", "a\nb", extra={"bytes": 5})
    event = json.loads(stream.getvalue())
    assert event.pop("timestamp").endswith("Z")
    assert event == {"level": "warning", "logger": "fusecache.test", "event": "fetched a\nb", "bytes": 5}
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("format", ["text", "json"])
def test_secrets_are_taken_out_wherever_they_are(format: Literal["text", "json"]) -> None:
    stream = lines(format)
    _log.info(
        "key %s", SECRET, extra={"url": "https://h/?k=wJalr%2FXUt%2Bn%3DFEMI", "options": {"k": SECRET}}
    )
    try:
        raise ValueError(f"bad {SECRET}")
    except ValueError:
        _log.exception("failed")
    text = stream.getvalue()
    assert "wJalr" not in text
    assert text.count(REDACTED) == 4


def test_levels_and_libraries() -> None:
    stream = lines("text", "debug")
    _log.debug("ours")
    logging.getLogger("botocore.auth").debug("theirs")
    logging.getLogger("botocore.auth").warning("important")
    assert "ours" in stream.getvalue()
    assert "theirs" not in stream.getvalue()
    assert "important" in stream.getvalue()


def test_a_new_configuration_replaces_the_old_one(tmp_path: Path) -> None:
    stream = lines("text")
    file = tmp_path / "log"
    configure_logging(file=file)
    _log.info("to the file")
    assert stream.getvalue() == ""
    assert "to the file" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.rename(tmp_path / "log.1")
    _log.info("after the rotation")
    assert "after the rotation" in file.read_text()


def test_a_log_file_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log_file .*No such file"):
        configure_logging(file=tmp_path / "missing" / "log")


def test_repeats_are_held_back_and_counted() -> None:
    now = 0.0
    repeats = RepeatFilter(clock=lambda: now)

    def record(message: str, level: int = logging.WARNING) -> logging.LogRecord:
        return logging.LogRecord("fusecache.x", level, __file__, 1, message, ("a",), None)

    assert [repeats.filter(record("again %s")) for _ in range(BURST_EVENTS + 3)] == [True] * BURST_EVENTS + [
        False
    ] * 3
    assert repeats.filter(record("another %s"))
    assert all(repeats.filter(record("again %s", logging.DEBUG)) for _ in range(2 * BURST_EVENTS))
    now = BURST_WINDOW_SECONDS
    later = record("again %s")
    assert repeats.filter(later)
    assert later.__dict__["repeats_held_back"] == 3


STATUS: dict[str, Any] = {
    "mode": {"now": "passthrough", "why": ""},
    "bytes": {"store": 10, "peer": 0, "origin": 20},
    "opens": {"passthrough": 1, "daemon": 2},
    "cache": {
        "dir": "/c",
        "used": 100,
        "limit": 200,
        "memory_used": 50,
        "memory_limit": 60,
        "objects_complete": 3,
        "objects_partial": 4,
        "evictions": 5,
        "corrupt_blocks": 6,
        "sick": False,
    },
    "origin": {
        "requests": 7,
        "errors": 8,
        "throttled": 9,
        "retries": 1,
        "lists": 2,
        "bytes": 3,
        "concurrency": 16,
    },
    "loader": {"waiting_reads": 1, "bytes_to_fetch": 2},
    "peers": {
        "bytes_in": 1,
        "bytes_out": 2,
        "nodes": 3,
        "errors": 4,
        "bad_blocks": 5,
        "fallbacks": 6,
        "refused": 7,
        "sending": 8,
    },
    "orders": {"stored": 1, "recorded": 2, "replayed": 3, "wrong": 4, "from_nodes": 5},
    "catalog": {"files": 10, "bytes": 1000, "age": 2.5},
    "errors": {"unavailable": 3},
    "process": {"pid": 1, "rss": 1 << 20, "cpu_seconds": 1.5, "uptime": 60.0, "keeper_pid": 2, "restarts": 0},
}


def collected(status: Any) -> dict[str, float]:
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for metric in StatusCollector(status).collect()
        for sample in metric.samples
    }


def test_every_metric_has_a_value_in_a_full_status() -> None:
    found = collected(lambda: STATUS)
    assert {name.partition("[")[0] for name in found} == {d.name for d in METRICS} | {
        "fusecache_up",
        "fusecache_passthrough",
    }
    assert found["fusecache_served_bytes_total[origin]"] == 20
    assert found["fusecache_cache_objects[partial]"] == 4
    assert found["fusecache_errors_total[unavailable]"] == 3
    assert found["fusecache_passthrough"] == 1
    assert found["fusecache_cache_sick"] == 0


def test_names_follow_the_rules() -> None:
    assert len({definition.name for definition in METRICS}) == len(METRICS)
    for definition in METRICS:
        assert definition.name.startswith("fusecache_")
        assert definition.name.endswith("_total") == (definition.kind == "counter")
        assert definition.meaning.endswith(".")


def test_a_partial_or_failing_status() -> None:
    assert collected(lambda: {"mode": {"now": "daemon"}}) == {"fusecache_up": 1, "fusecache_passthrough": 0}

    def fail() -> Any:
        raise RuntimeError("no")

    assert collected(fail) == {"fusecache_up": 0}


def test_served_over_http_and_closed() -> None:
    server = MetricsServer(0, StatusCollector(lambda: STATUS))
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as page:
            text = page.read().decode()
        assert 'fusecache_served_bytes_total{tier="store"} 10.0' in text
        with pytest.raises(ConfigError, match="metrics_port"):
            MetricsServer(server.port, StatusCollector(lambda: STATUS))
    finally:
        server.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10)
