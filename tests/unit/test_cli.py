"""The command line against a daemon that is played by the test, and against a real store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import trio
import xxhash

from fusecache.cli import main as cli
from fusecache.cli import output
from fusecache.cli.cache import is_named_by
from fusecache.control import mounts, server
from fusecache.errors import ControlError, StoreError
from fusecache.store.store import Store
from fusecache.types import ObjectVersion

STATUS: dict[str, Any] = {
    "mountpoint": "/models",
    "sources": [
        {"name": "", "url": "s3://models", "identity": "s3://models@http://h:1", "engine": "obstore"},
        {"name": "b", "url": "gs://x"},
    ],
    "mode": {"now": "daemon", "why": "no CAP_SYS_ADMIN"},
    "bytes": {"store": 3 << 30, "peer": 0, "origin": 512 << 20},
    "opens": {"passthrough": 1, "daemon": 2},
    "cache": {
        "dir": "/c",
        "used": 1 << 30,
        "limit": 4 << 30,
        "objects_complete": 3,
        "objects_partial": 4,
        "evictions": 5,
        "corrupt_blocks": 6,
        "sick": True,
    },
    "origin": {"requests": 7, "errors": 8, "throttled": 9, "bytes": 1024},
    "loader": {"fetching": 1, "bytes_to_fetch": 2048, "waiting_reads": 3},
    "catalog": {"files": 10, "bytes": 1000, "age": 7200.0},
    "errors": {"unavailable": 3, "denied": 0},
    "process": {"pid": 77, "rss": 100 << 20, "cpu_seconds": 1.5, "uptime": 60.0, "restarts": 2},
}


def thing(name: str, *, pinned: bool = False, present: int = 10, size: int = 10) -> dict[str, Any]:
    return {
        "path": name,
        "key": name,
        "source": "s3://models",
        "bytes": present,
        "size": size,
        "complete": present == size,
        "pinned": pinned,
        "last_use": 0,
        "id": xxhash.xxh3_128_hexdigest(name.encode()),
    }


class Daemon:
    """Plays the daemon of one mount: `answers` maps an operation to its result, or to what makes it."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"status": STATUS}
        self.requests: list[dict[str, Any]] = []

    async def handle(self, request: dict[str, Any]) -> object:
        request.pop("deadline")
        self.requests.append(request)
        answer = self.answers[request["op"]]
        return answer(request) if callable(answer) else answer


def run_daemon(path: Path, daemon: Daemon) -> Callable[[], None]:
    """Serve in a thread; returns what ends it."""
    ready = threading.Event()
    ends: list[Callable[[], None]] = []

    async def serve() -> None:
        handlers = dict.fromkeys(("status", "ls", "evict", "pin", "refresh", "fetch"), daemon.handle)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_requests, path, handlers)
            token = trio.lowlevel.current_trio_token()
            ends.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(10)

    def end() -> None:
        ends[0]()
        thread.join(10)

    return end


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[mounts.Mount]:
    """The mounts of this machine, as the commands see them: none at first."""
    found: list[mounts.Mount] = []
    monkeypatch.setattr(mounts, "list_mounts", lambda *_: list(found))
    monkeypatch.setenv("FUSECACHE_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("fusecache.cli.cache.default_cache_dir", lambda: tmp_path / "no-cache")
    return found


@pytest.fixture
def daemon(tmp_path: Path, machine: list[mounts.Mount]) -> Iterator[Daemon]:
    """A daemon that serves /models."""
    (tmp_path / "run").mkdir()
    machine.append(mounts.Mount(Path("/models"), "s3://models", "0:50", 0))
    played = Daemon()
    end = run_daemon(mounts.control_socket_path(tmp_path / "run", Path("/models")), played)
    yield played
    end()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.run_command(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


Run = Callable[..., tuple[int, str, str]]


def mistake(result: tuple[int, str, str], code: int, *texts: str) -> None:
    assert result[0] == code
    assert result[2].startswith("fusecache: ")
    assert result[2].count("\n") == 1
    for text in texts:
        assert text in result[2]


# -- the shell around the commands


def test_version_and_help(run: Run) -> None:
    assert run("--version")[1].startswith("fusecache 0.")
    assert run("--help")[0] == 0
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "Commands:" in err


def test_every_command_has_help(run: Run) -> None:
    for name in cli.cli.list_commands(click.Context(cli.cli)):
        code, out, _ = run(name, "--help")
        assert code == 0
        assert "Usage: fusecache" in out


def test_wrong_command_lines(run: Run) -> None:
    mistake(run("stauts"), 2, "did you mean status?")
    mistake(run("xyzzy"), 2, "commands are")
    mistake(run("status", "--jsn"), 2, "--json", "fusecache status --help")
    mistake(run("fetch"), 2, "PATH")
    mistake(run("evict"), 2, "either paths or --all")
    mistake(run("doctor", "s3://x", "-o", "regoin=y"), 2, "did you mean region?")


def raising(error: Exception) -> click.Command:
    @click.command("ls")
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (ControlError("a\nb"), 1, "a b"),
        (StoreError("no"), 1, "no"),
        (click.FileError("f", "hint"), 1, "hint"),
    ],
)
def test_foreseen_errors(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, text: str
) -> None:
    monkeypatch.setattr("fusecache.cli.cache.ls_command", raising(error))
    mistake(run("ls"), code, text)


def test_an_unforeseen_error_tells_no_secret(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.cli.cache.ls_command", raising(RuntimeError("s3cr3t")))
    result = run("ls")
    mistake(result, 1, "RuntimeError", "FUSECACHE_DEBUG=1")
    assert "s3cr3t" not in result[2]
    monkeypatch.setenv("FUSECACHE_DEBUG", "1")
    with pytest.raises(RuntimeError):
        run("ls")


def test_an_interrupt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.cli.cache.ls_command", raising(click.Abort()))
    mistake(run("ls"), 130, "interrupted")


# -- status


def test_status_of_nothing(run: Run, machine: list[mounts.Mount]) -> None:
    assert run("status") == (0, "no fusecache mounts\n", "")
    assert run("status", "--json") == (0, "[]\n", "")
    mistake(run("status", "/models"), 1, "/models is not a fusecache mountpoint")


def test_status_as_json(run: Run, daemon: Daemon) -> None:
    code, out, err = run("status", "/models", "--json")
    assert (code, json.loads(out), err) == (0, STATUS, "")
    assert json.loads(run("status", "--json")[1]) == [STATUS]


def test_status_for_people(run: Run, daemon: Daemon) -> None:
    code, out, _ = run("status", "/models/")
    assert code == 0
    for text in (
        "/models",
        "s3://models@http://h:1 (obstore)",
        "b/: gs://x",
        "daemon: no CAP_SYS_ADMIN",
        "3 GiB from store, 0 B from peer, 512 MiB from origin",
        "1 passthrough, 2 daemon",
        "1 GiB of 4 GiB (25%) in /c",
        "3 complete, 4 partial, 5 evicted, 6 damaged",
        "7 requests, 8 errors, 9 throttled, 1 KiB received",
        "10 files, 1000 B, listed 2 h ago",
        "3 unavailable",
        "pid 77, 100 MiB memory, 1.5 s CPU, up 60 s, restarted 2 times",
        "the cache disk fails",
    ):
        assert text in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_status_of_another_version(run: Run, daemon: Daemon) -> None:
    daemon.answers["status"] = {"mountpoint": "/models"}
    assert run("status", "/models")[:2] == (0, "mount  /models\n")


def test_status_inside_a_mount(run: Run, daemon: Daemon) -> None:
    mistake(run("status", "/models/llama"), 1, "it lies in the mount /models")


def test_status_without_a_daemon(run: Run, machine: list[mounts.Mount]) -> None:
    machine.append(mounts.Mount(Path("/models"), "s3://models", "0:50", 0))
    mistake(run("status", "/models"), 1, "/models: no daemon listens", "fusecache umount /models")
    code, out, err = run("status", "--json")
    assert (code, out) == (1, "[]\n")
    assert "no daemon" in err


# -- refresh and fetch


def test_refresh(run: Run, daemon: Daemon, machine: list[mounts.Mount]) -> None:
    daemon.answers["refresh"] = {"files": 12}
    assert run("refresh") == (0, "/models: 12 files\n", "")
    machine.append(mounts.Mount(Path("/other"), "s3://o", "0:51", 0))
    mistake(run("refresh"), 1, "name one of the mounts: /models, /other")
    machine.clear()
    mistake(run("refresh"), 1, "nothing is mounted")


def test_fetch_polls_until_all_is_there(run: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.cli.fetch._POLL_INTERVAL", 0)
    done = iter([0, 1 << 20, 1 << 20, 3 << 20])
    daemon.answers["fetch"] = lambda _: {"done": next(done), "total": 3 << 20}
    assert run("fetch", "/models/llama/x") == (0, "/models/llama/x: 3 MiB in the cache\n", "")
    assert daemon.requests == [{"op": "fetch", "path": "llama/x"}] * 4


def test_fetch_does_not_wait_when_asked_not_to(run: Run, daemon: Daemon) -> None:
    daemon.answers["fetch"] = {"done": 0, "total": 5}
    assert run("fetch", "--no-wait", "/models") == (0, "", "")
    assert len(daemon.requests) == 1


def test_fetch_gives_up_without_progress(run: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.cli.fetch._POLL_INTERVAL", 0)
    monkeypatch.setattr("fusecache.cli.fetch._STALL_TIMEOUT", 0)
    daemon.answers["fetch"] = {"done": 1, "total": 5}
    mistake(run("fetch", "/models/x"), 1, "no progress at 1 B of 5 B")


def test_fetch_outside_a_mount(run: Run, machine: list[mounts.Mount]) -> None:
    mistake(run("fetch", "/elsewhere"), 1, "/elsewhere is not inside a fusecache mount")


# -- the cache, through a daemon


def test_ls(run: Run, daemon: Daemon) -> None:
    daemon.answers["ls"] = [thing("b", pinned=True), thing("a", present=9999, size=10000)]
    code, out, _ = run("ls")
    assert code == 0
    header, first, second = out.splitlines()
    assert header.split() == ["PATH", "SIZE", "CACHED", "PINNED", "USED", "SOURCE"]
    assert first.split() == ["a", "9.8", "KiB", "99%", "never", "s3://models"]
    assert second.split() == ["b", "10", "B", "100%", "pinned", "never", "s3://models"]
    assert [item["path"] for item in json.loads(run("ls", "/models", "--json")[1])] == ["a", "b"]


def test_ls_without_a_cache(run: Run, machine: list[mounts.Mount], tmp_path: Path) -> None:
    mistake(run("ls"), 1, "--cache-dir")
    mistake(run("ls", "--cache-dir", str(tmp_path)), 1, "is not a cache directory")


def test_evict_a_folder(run: Run, daemon: Daemon) -> None:
    daemon.answers["ls"] = [thing("llama/a"), thing("llama/b"), thing("llama2")]
    daemon.answers["evict"] = {"freed": 10, "objects": 1}
    assert run("evict", "/models/llama") == (0, "evicted 2 objects, 20 B\n", "")
    asked = [request["id"] for request in daemon.requests if request["op"] == "evict"]
    assert asked == [thing("llama/a")["id"], thing("llama/b")["id"]]


def refuse(request: dict[str, Any]) -> object:
    raise ControlError("in use")


def test_evict_says_what_stays(run: Run, daemon: Daemon) -> None:
    daemon.answers["ls"] = [thing("a"), thing("p", pinned=True)]
    daemon.answers["evict"] = refuse
    mistake(run("evict", "/models/a"), 1, "in use")
    mistake(run("evict", "/models/zzz"), 1, "/models/zzz is not in the cache")
    assert run("evict", "--all") == (0, "evicted 0 objects, 0 B\n", "")
    assert [r["id"] for r in daemon.requests if r["op"] == "evict"] == [thing("a")["id"]] * 2


def test_pin_and_unpin(run: Run, daemon: Daemon) -> None:
    daemon.answers["ls"] = [thing("llama/a")]
    daemon.answers["pin"] = {"objects": 1}
    assert run("pin", "/models/llama") == (0, "pinned 1 objects\n", "")
    assert run("unpin", "/models/llama/a") == (0, "unpinned 1 objects\n", "")
    assert [r["on"] for r in daemon.requests if r["op"] == "pin"] == [True, False]
    mistake(run("pin", "/models/b"), 1, "read or fetch it first")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("", True),
        ("a", True),
        ("a/", True),
        ("a/b", True),
        ("a/b/c", False),
        ("s3://m/a", True),
        ("aa", False),
    ],
)
def test_what_a_path_names(wanted: str, found: bool) -> None:
    assert is_named_by({"key": "a/b", "source": "s3://m", "id": "0" * 32}, wanted) == found
    assert is_named_by({"key": "a/b", "source": "s3://m", "id": "0" * 32}, "0" * 32)


# -- the cache, directly


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache directory with llama/{a,b}, of which b is partial."""
    directory = tmp_path / "cache"
    block = bytes(64 << 10)
    with Store(directory, limit=1 << 30, free_floor=0, block_size=len(block)) as store:
        for key, size in (("llama/a", len(block)), ("llama/b", 2 * len(block))):
            stored = store.open(ObjectVersion("s3://m", key, "e", size, 1))
            assert stored.reserve_bytes(len(block))
            stored.write(0, block)
            stored.commit_block(0, xxhash.xxh3_64_intdigest(block))
            stored.close()
    return directory


def test_a_cache_directory_without_a_mount(run: Run, machine: list[mounts.Mount], cache: Path) -> None:
    at = ("--cache-dir", str(cache))
    items = json.loads(run("ls", *at, "--json")[1])
    assert [(i["key"], i["bytes"], i["complete"], i["pinned"]) for i in items] == [
        ("llama/a", 64 << 10, True, False),
        ("llama/b", 64 << 10, False, False),
    ]
    assert run("pin", *at, "s3://m/llama/a") == (0, "pinned 1 objects\n", "")
    mistake(run("evict", *at, "llama/a"), 1, "pinned")
    code, out, err = run("evict", *at, "--all")
    assert (code, err) == (0, "")
    assert out.startswith("evicted 1 objects")
    assert run("unpin", *at, "llama")[0] == 0
    assert run("evict", *at, "llama")[1].startswith("evicted 1 objects")
    assert json.loads(run("ls", *at, "--json")[1]) == []


def test_a_cache_of_another_version(run: Run, machine: list[mounts.Mount], cache: Path) -> None:
    (cache / "format").write_text("fusecache store 99\n")
    mistake(run("ls", "--cache-dir", str(cache)), 1, "another version")


# -- what is printed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 d")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert output.format_duration(seconds) == text


def test_long_names_are_not_cut_in_a_pipe(run: Run, daemon: Daemon) -> None:
    name = "d/" * 150 + "model.safetensors"
    daemon.answers["ls"] = [thing(name)]
    assert name in run("ls")[1]


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.show_progress("x", 5, unit="objects") as bar:
        bar.move_to(3)
    assert capsys.readouterr() == ("", "")
