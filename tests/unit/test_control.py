"""The control channel: good and bad requests, peers, stale sockets, deadlines."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fusecache.control import client, protocol, server
from fusecache.errors import ControlError, DaemonUnreachableError, MountError


async def echo(request: dict[str, Any]) -> object:
    return request.get("value")


async def refuse(request: dict[str, Any]) -> object:
    raise ControlError("not\ntoday")


async def crash(request: dict[str, Any]) -> object:
    raise RuntimeError("secret internals")


async def hang(request: dict[str, Any]) -> object:
    await trio.sleep_forever()


class Numbers:
    """Counts until it is told to stop."""

    def __init__(self, step: float = 0.001, size: int = 0) -> None:
        self.step = step
        self.padding = "x" * size
        self.told = 0
        self.closed = 0

    async def next_item(self, stop: trio.Event) -> object | None:
        if stop.is_set():
            return None
        await trio.sleep(self.step)
        self.told += 1
        if self.padding == "fail":
            raise RuntimeError("secret internals")
        return [self.told, self.padding]

    def result(self) -> object:
        return {"told": self.told}

    async def close(self) -> None:
        await trio.sleep(0.001)
        self.closed += 1


STREAMS: list[Numbers] = []


async def count(request: dict[str, Any]) -> object:
    STREAMS.append(Numbers(size=int(request.get("size", 0))))
    if request.get("fail"):
        STREAMS[-1].padding = "fail"
    return STREAMS[-1]


HANDLERS: dict[str, server.Handler] = {
    "echo": echo,
    "refuse": refuse,
    "crash": crash,
    "hang": hang,
    "count": count,
}


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            await server.serve_requests(path, HANDLERS, task_status=task_status)

        await nursery.start(run)
        yield
        nursery.cancel_scope.cancel()


async def ask(path: Path, op: str, timeout: float = 10.0, **args: Any) -> Any:
    return await trio.to_thread.run_sync(lambda: client.call_daemon(path, op, timeout=timeout, **args))


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
        (b"x" * (protocol.MAX_REQUEST_BYTES + 1), "longer"),
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
    assert 5 <= trio.current_time() < protocol.DEFAULT_DEADLINE


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
            await server.serve_requests(path, HANDLERS)
        assert await ask(path, "echo", value=4) == 4


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / "control.sock"
    async with served(path):
        assert await ask(path, "echo", value=5) == 5


async def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MountError, match="somebody else"):
        await server.serve_requests(tmp_path / "link" / "control.sock", HANDLERS)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="no daemon"):
        client.call_daemon(tmp_path / "control.sock", "status")
    with pytest.raises(DaemonUnreachableError, match="no daemon"):
        client.call_daemon(tmp_path / "missing" / "control.sock", "status")


@contextmanager
def answering(path: Path, reply: bytes) -> Iterator[None]:
    """A daemon that gives one answer, all at once."""
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
        yield
        thread.join()


@pytest.mark.parametrize("reply", [b"", b'{"ok": true', b"junk\n", b"[]\n", b"{}\n"])
def test_a_broken_reply(tmp_path: Path, reply: bytes) -> None:
    with answering(tmp_path / "s", reply), pytest.raises(DaemonUnreachableError, match="went away"):
        client.call_daemon(tmp_path / "s", "status")


def test_a_stream_that_is_ahead_of_who_wants_one_answer(tmp_path: Path) -> None:
    items = b'{"ok": true, "item": 1}\n{"ok": true, "item": 2}\n'
    with answering(tmp_path / "s", items), pytest.raises(ControlError, match="stream"):
        client.call_daemon(tmp_path / "s", "count")


def test_a_stuck_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(DaemonUnreachableError, match=r"within 0\.05 s"):
            client.call_daemon(path, "status", timeout=0.05)


async def closed(stream: Numbers) -> None:
    with trio.fail_after(10):
        while not stream.closed:  # noqa: ASYNC110
            await trio.sleep(0.005)
    assert stream.closed == 1


async def test_a_stream_goes_on_until_the_client_wants_the_end(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    def follow() -> tuple[list[Any], Any]:
        found = []
        with client.StreamedCall(path, "count") as following:
            for item in following:
                found.append(item[0])
                if len(found) == 5:
                    following.request_end()
            return found, following.result

    async with served(path):
        found, result = await trio.to_thread.run_sync(follow)
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= 5
        assert result == {"told": len(found)}
        await closed(STREAMS[-1])


async def test_a_connection_is_of_use_after_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        stream = await trio.open_unix_socket(str(path))
        async with stream:
            await stream.send_all(b'{"op": "count"}\n')
            received = b""
            while b"item" not in received:
                received += await stream.receive_some()
            await stream.send_all(b"{}\n")
            while b"result" not in received:
                received += await stream.receive_some()
            await stream.send_all(b'{"op": "echo", "value": 3}\n')
            assert json.loads(await stream.receive_some()) == {"ok": True, "result": 3}


async def test_a_client_that_goes_away_ends_its_stream(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        stream = await trio.open_unix_socket(str(path))
        await stream.send_all(b'{"op": "count"}\n')
        assert await stream.receive_some()
        await stream.aclose()
        await closed(STREAMS[-1])
        assert await ask(path, "echo", value=1) == 1


async def test_a_client_that_takes_nothing_ends_its_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STREAM_TIMEOUT", 0.05)
    path = tmp_path / "control.sock"
    async with served(path):
        stream = await trio.open_unix_socket(str(path))
        async with stream:
            await stream.send_all(b'{"op": "count", "size": 4000000}\n')
            with trio.fail_after(10):
                while not STREAMS or STREAMS[-1].padding != "x" * 4_000_000:  # noqa: ASYNC110
                    await trio.sleep(0.005)
            await closed(STREAMS[-1])


async def test_a_stream_that_fails_ends_the_connection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        answer = await exchange(path, b'{"op": "count", "fail": true}\n')
        assert answer == b""
        await closed(STREAMS[-1])
        assert "a stream failed" in caplog.text
        caplog.clear()
        assert await ask(path, "echo", value=1) == 1


async def test_call_wants_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with served(path):
        with pytest.raises(ControlError, match="stream"):
            await ask(path, "count")
        await closed(STREAMS[-1])


async def test_nobody_answers_who_follows(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="no daemon listens"):
        client.StreamedCall(tmp_path / "control.sock", "count")
    path = tmp_path / "control.sock"
    async with served(path):

        def follow() -> None:
            with client.StreamedCall(path, "refuse") as following:
                list(following)

        with pytest.raises(ControlError, match="not today"):
            await trio.to_thread.run_sync(follow)


def test_lines_come_whole_however_they_are_cut() -> None:
    buffer = protocol.LineBuffer(5)
    found = []
    for byte in b"one\n\nthree\n":
        buffer.feed(bytes([byte]))
        while (line := buffer.next_line()) is not None:
            found.append(line)
    assert found == [b"one", b"", b"three"]
    buffer.feed(b"a\nb\nc")
    assert [buffer.next_line() for _ in range(3)] == [b"a", b"b", None]


@pytest.mark.parametrize("data", [b"123456", b"123456\n"])
def test_a_line_has_its_limit(data: bytes) -> None:
    buffer = protocol.LineBuffer(5)
    buffer.feed(data)
    with pytest.raises(protocol.LineTooLongError, match="longer than 5 bytes"):
        buffer.next_line()
