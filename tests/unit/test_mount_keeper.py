"""The keeper without a mount: its messages, and when it starts a daemon again."""

from __future__ import annotations

import base64
import json

import pytest

from fusecache_mount.lifecycle.keeper_protocol import DaemonMessage, KeeperSettings, StartMessage
from fusecache_mount.lifecycle.restart_policy import MAX_RESTARTS, RESTART_WINDOW, RestartPolicy


@pytest.mark.parametrize("init", [None, b"\x00\xff init"])
def test_a_start_message_comes_through(init: bytes | None) -> None:
    sent = StartMessage(3, init, "id", "/run/fusecache", False, "no CAP_SYS_ADMIN")
    assert StartMessage.from_json(sent.to_json()) == sent
    assert json.loads(sent.to_json()) == {
        "restarts": 3,
        "init": None if init is None else base64.b64encode(init).decode(),
        "mount_id": "id",
        "runtime_dir": "/run/fusecache",
        "privileged": False,
        "why": "no CAP_SYS_ADMIN",
    }


@pytest.mark.parametrize(
    "message",
    [DaemonMessage(is_ready=True), DaemonMessage(error="one line"), DaemonMessage(answered_init=b"\x1a")],
)
def test_a_daemon_message_comes_through(message: DaemonMessage) -> None:
    assert DaemonMessage.from_json(message.to_json()) == message


def test_an_error_becomes_one_line() -> None:
    assert DaemonMessage.from_json(b'{"error": "no\\n  bucket"}').error == "no bucket"


@pytest.mark.parametrize(
    ("junk", "error"),
    [
        (b"", "Expecting value"),
        (b"junk", "Expecting value"),
        (b"[]", "JSON object"),
        (b"3", "JSON object"),
        (b'{"init": "x"}', "base64"),
        (b"\xff", "codec"),
    ],
)
def test_junk_is_no_message(junk: bytes, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        DaemonMessage.from_json(junk)


def test_settings_come_through() -> None:
    settings = KeeperSettings("/m", 40, "id", "/run", "/run/id", True, "", daemon_command=["a", "b"])
    assert KeeperSettings.from_json(settings.to_json()) == settings


def test_the_pauses_grow_and_the_restarts_end() -> None:
    policy = RestartPolicy()
    pauses = [policy.record_crash(float(second)) for second in range(MAX_RESTARTS)]
    assert pauses == [0.05, 0.2, 0.5, 1.0, 2.0]
    assert policy.record_crash(RESTART_WINDOW - 1) is None
    assert policy.crash_count == MAX_RESTARTS + 1


def test_old_crashes_do_not_count() -> None:
    policy = RestartPolicy(backoff=2.0)
    for second in range(MAX_RESTARTS):
        policy.record_crash(float(second))
    assert policy.record_crash(MAX_RESTARTS + 2 * RESTART_WINDOW) == 0.1
    assert policy.crash_count == MAX_RESTARTS + 1
