"""`fusecache status --json` after a cold and after a warm load, with and without passthrough."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.content import content
from tests.support.faulty import FaultyServer
from tests.support.kept import ended
from tests.support.live import MIB, is_right, keeper_pid, status, wait_cached
from tests.support.mounting import RealMount, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, S3Server

pytestmark = needs_fuse

_SIZE = 5 * MIB + 99
_NAMES = ("m/model-1.safetensors", "m/model-2.safetensors")
_LIMIT = 1 << 30


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> S3Bucket:
    """Two shards."""
    made = s3_server.bucket()
    for name in _NAMES:
        made.put(name, content(name, 1, 0, _SIZE))
    return made


@pytest.fixture(scope="module", params=["auto", "off"])
def stages(
    request: pytest.FixtureRequest,
    bucket: S3Bucket,
    s3_server: S3Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, dict[str, Any]]]:
    """The status of a fresh mount, after a cold load and after a warm load; `_` holds what it should say."""
    work = tmp_path_factory.mktemp(f"status-{request.param}")
    with FaultyServer(s3_server.endpoint) as proxy:
        env = s3_environment(s3_server, proxy.url)
        with mounted(bucket.url, work, env=env, passthrough=request.param, prefetch_budget=0) as mount:
            found = {"fresh": status(mount)}
            load(mount)
            for name in _NAMES:
                wait_cached(mount.path / name, _SIZE)
            found["cold"] = status(mount)
            load(mount)
            found["warm"] = status(mount)
            counts = proxy.counts()
            found["_"] = {
                "passthrough": request.param,
                "work": work,
                "mountpoint": str(mount.path),
                "url": bucket.url,
                "keeper": keeper_pid(mount),
                "proxy": proxy.url,
                "requests": counts.total(),
                "lists": counts["LIST"],
            }
            yield found
    assert ended(found["warm"]["process"]["pid"])


def load(mount: RealMount) -> None:
    for name in _NAMES:
        is_right(mount.path / name, name, _SIZE)


@pytest.mark.parametrize("stage", ["fresh", "cold", "warm"])
def test_all_keys_are_there(stages: dict[str, dict[str, Any]], stage: str) -> None:
    found = stages[stage]
    wanted = {
        "mode": {"now", "why"},
        "bytes": {"store", "peer", "origin"},
        "opens": {"passthrough", "daemon"},
        "cache": {"dir", "used", "limit", "objects_complete", "objects_partial"},
        "origin": {"requests", "errors", "throttled"},
        "process": {"pid", "rss", "cpu_seconds", "uptime", "keeper_pid", "restarts"},
    }
    for group, keys in wanted.items():
        assert keys <= set(found[group]), group
        for key in keys - {"now", "why", "dir"}:
            assert found[group][key] >= 0, (group, key)
    assert found["mode"]["now"] in ("passthrough", "daemon")
    assert found["mode"]["why"]
    assert found["mountpoint"] == stages["_"]["mountpoint"]
    assert found["cache"]["dir"] == str(stages["_"]["work"] / "cache")
    assert found["cache"]["limit"] == _LIMIT
    (source,) = found["sources"]
    assert source["url"] == stages["_"]["url"]
    assert source["identity"] == f"{source['url']}@{stages['_']['proxy'].removeprefix('http://')}"


def test_the_mode_is_the_one_that_was_asked_for(stages: dict[str, dict[str, Any]]) -> None:
    mode = stages["warm"]["mode"]
    if stages["_"]["passthrough"] == "off":
        assert mode == {"now": "daemon", "why": "turned off (passthrough=off)"}
    elif mode["now"] == "daemon":
        pytest.skip(f"no passthrough here: {mode['why']}")


def test_a_fresh_mount(stages: dict[str, dict[str, Any]]) -> None:
    found = stages["fresh"]
    assert found["bytes"] == {"store": 0, "peer": 0, "origin": 0}
    assert found["opens"] == {"passthrough": 0, "daemon": 0}
    assert found["cache"]["used"] < MIB
    assert found["cache"]["objects_complete"] == found["cache"]["objects_partial"] == 0
    assert found["origin"]["requests"] == 1
    assert found["catalog"]["files"] == len(_NAMES)
    assert found["catalog"]["bytes"] == len(_NAMES) * _SIZE


def test_a_cold_load(stages: dict[str, dict[str, Any]]) -> None:
    found = stages["cold"]
    total = len(_NAMES) * _SIZE
    assert found["bytes"]["origin"] == total
    assert found["bytes"]["peer"] == 0
    assert found["origin"]["bytes"] == total
    assert found["origin"]["requests"] >= 1 + len(_NAMES)
    assert found["origin"]["errors"] == found["origin"]["throttled"] == 0
    assert sum(found["opens"].values()) == len(_NAMES)
    assert total <= found["cache"]["used"] < total + 2 * MIB
    assert found["cache"]["objects_complete"] == len(_NAMES)
    assert found["cache"]["objects_partial"] == 0


def test_a_warm_load(stages: dict[str, dict[str, Any]]) -> None:
    cold, warm = stages["cold"], stages["warm"]
    assert warm["bytes"]["origin"] == cold["bytes"]["origin"]
    assert warm["origin"]["requests"] == cold["origin"]["requests"] == stages["_"]["requests"]
    assert warm["origin"]["lists"] == stages["_"]["lists"]
    opened = {by: warm["opens"][by] - cold["opens"][by] for by in warm["opens"]}
    served = warm["bytes"]["store"] - cold["bytes"]["store"]
    if warm["mode"]["now"] == "passthrough":
        assert opened == {"passthrough": len(_NAMES), "daemon": 0}
        assert served == 0  # the kernel reads by itself
    else:
        assert opened == {"passthrough": 0, "daemon": len(_NAMES)}
        assert served == len(_NAMES) * _SIZE
    assert warm["reads"]["failed"] == 0


def test_the_processes(stages: dict[str, dict[str, Any]]) -> None:
    fresh, warm = stages["fresh"]["process"], stages["warm"]["process"]
    assert warm["pid"] == fresh["pid"] != os.getpid()
    assert warm["keeper_pid"] == stages["_"]["keeper"]
    status_of = dict(
        line.split(":", 1) for line in Path(f"/proc/{warm['pid']}/status").read_text().splitlines()
    )
    assert int(status_of["PPid"]) == warm["keeper_pid"]
    peak = int(status_of["VmHWM"].split()[0]) * 1024
    assert 10 * MIB < warm["rss"] <= peak
    assert warm["cpu_seconds"] >= fresh["cpu_seconds"] > 0
    assert warm["uptime"] > fresh["uptime"] > 0
    assert warm["restarts"] == 0


def test_the_words_for_people(s3_server: S3Server, bucket: S3Bucket, tmp_path: Path) -> None:
    with mounted(bucket.url, tmp_path, env=s3_environment(s3_server)) as mount:
        load(mount)
        said = mount.command("status", str(mount.path)).stdout
        for word in (str(mount.path), bucket.url, "from origin", "passthrough", str(tmp_path / "cache")):
            assert word in said.replace("\n", ""), word
        assert s3_server.secret_key not in said
    gone = mount.command("status", str(mount.path), check=False)
    assert gone.returncode == 1
    assert "not a fusecache mountpoint" in gone.stderr
    assert gone.stderr.count("\n") == 1
