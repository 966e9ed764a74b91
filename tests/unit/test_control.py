"""The control channel: good and bad requests, peers, stale sockets, deadlines."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fusecache import control
from fusecache.errors import ControlError, DaemonUnreachableError, MountError


async def echo(request: dict[str, Any]) -> object:
    return request.get("value")


async def refuse(request: dict[str, Any]) -> object:
    raise ControlError("not\ntoday")


async def crash(request: dict[str, Any]) -> object:
    raise RuntimeError("secret internals")


async def hang(request: dict[str, Any]) -> object:
    await trio.sleep_forever()


HANDLERS: dict[str, control.Handler] = {"echo": echo, "refuse": refuse, "crash": crash, "hang": hang}


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            await control.serve(path, HANDLERS, task_status=task_status)

        await nursery.start(run)
        yield
        nursery.cancel_scope.cancel()


async def ask(path: Path, op: str, timeout: float = 10.0, **args: Any) -> Any:
    return await trio.to_thread.run_sync(lambda: control.call(path, op, timeout=timeout, **args))


async def exchange(path: Path, data: bytes) -> bytes:
    directory = os.open(path.parent, os.O_PATH)
    try:
        stream = await trio.open_unix_socket(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
    async with stream:
        for byte in range(0, len(data), max(1, len(data) // 7)):
            await stream.send_all(data[byte : byte + max(1, len(data) // 7)])
        received = b""
        while not received.endswith(b"\n"):
            part = await stream.receive_some()
            if not part:
                break
            received += part
        return received


async def test_answers_and_keeps_its_socket_private(tmp_path: Path) -> None:
    path = tmp_path / "mount" / "control.sock"
    async with served(path):
        assert await ask(path, "echo", value={"é": [1, None]}) == {"é": [1, None]}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert [entry.name for entry in path.parent.iterdir()] == ["control.sock"]
    assert not path.exists()


async def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        with pytest.raises(ControlError, match=r"^not today$"):
            await ask(path, "refuse")


async def test_a_crash_tells_no_internals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        with pytest.raises(ControlError, match="RuntimeError") as caught:
            await ask(path, "crash")
        assert "secret" not in str(caught.value)
        assert await ask(path, "echo", value=1) == 1
    assert "crash failed" in caplog.text


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"junk\n", "not JSON"),
        (b"[" * 60000 + b"\n", "not JSON"),
        (b"[]\n", "no op"),
        (b'{"op": 3}\n', "no op"),
        (b'{"op": "nonsense"}\n', "another version"),
        (b"\xff\n", "not JSON"),
        (b"x" * (control.MAX_REQUEST + 1), "longer"),
    ],
)
async def test_bad_requests_get_an_error(tmp_path: Path, data: bytes, error: str) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        reply = json.loads(await exchange(path, data))
        assert reply["ok"] is False
        assert error in reply["error"]
        assert await ask(path, "echo", value=2) == 2


async def test_a_request_ends_at_its_deadline(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        reply = json.loads(await exchange(path, b'{"op": "hang", "deadline": 5}\n'))
    assert reply == {"ok": False, "error": "hang: not done within 5 s"}
    assert 5 <= trio.current_time() < control.DEFAULT_DEADLINE


async def test_a_silent_client_is_dropped(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        assert await exchange(path, b'{"op": ') == b""


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with served(path):
        assert await ask(path, "echo", value=3) == 3
        with pytest.raises(MountError, match="another daemon"):
            await control.serve(path, HANDLERS)
        assert await ask(path, "echo", value=4) == 4


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / "control.sock"
    async with served(path):
        assert await ask(path, "echo", value=5) == 5


async def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MountError, match="somebody else"):
        await control.serve(tmp_path / "link" / "control.sock", HANDLERS)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="no daemon"):
        control.call(tmp_path / "control.sock", "status")
    with pytest.raises(DaemonUnreachableError, match="no daemon"):
        control.call(tmp_path / "missing" / "control.sock", "status")


@pytest.mark.parametrize("reply", [b"", b'{"ok": true', b"junk\n", b"[]\n", b"{}\n"])
def test_a_broken_reply(tmp_path: Path, reply: bytes) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DaemonUnreachableError, match="went away"):
            control.call(path, "status")
        thread.join()


def test_a_stuck_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(DaemonUnreachableError, match=r"within 0\.05 s"):
            control.call(path, "status", timeout=0.05)
