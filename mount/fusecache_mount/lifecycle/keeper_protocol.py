"""The messages between the programs of one mount: launcher -> keeper, keeper -> daemon, daemon -> keeper.

The launcher passes a KeeperSettings in a memory file. Keeper and daemon exchange JSON objects over a SOCK_SEQPACKET
pair:

    keeper -> daemon   first and once: {"restarts", "init", "mount_id", "runtime_dir", "privileged", "why"}
    daemon -> keeper   {"init": base64} once, {"ready": true} once, or {"error": "one line"}

A daemon that ends with EXIT_UPGRADE wants to be started again at once, in the version that is installed by then.
Standard library only, because the keeper lives on it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from dataclasses import dataclass, field

EXIT_UPGRADE = 75
MAX_MESSAGE_BYTES = 1 << 20
KEEPER_MODULE = "fusecache_mount.lifecycle.keeper"
DAEMON_COMMAND = (sys.executable, "-P", "-m", "fusecache_mount.lifecycle.daemon")


@dataclass(frozen=True)
class KeeperSettings:
    """The settings of a keeper, from the mount command. Deadlines are in seconds: `ready_deadline` for the start of a
    daemon, with its first listing; `stop_deadline` for open files to be closed after SIGTERM."""

    mountpoint: str
    connection: int
    mount_id: str
    runtime_dir: str
    mount_runtime_dir: str
    """The runtime directory of this mount: the pid file lies there."""
    is_privileged: bool
    unprivileged_reason: str
    log_file: str | None = None
    log_format: str = "text"
    foreground: bool = False
    ready_deadline: float = 600.0
    stop_deadline: float = 8.0
    backoff: float = 1.0
    """Factor of the pauses before restarts."""
    daemon_command: list[str] = field(default_factory=lambda: list(DAEMON_COMMAND))

    def to_json(self) -> bytes:
        """The content of the memory file."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> KeeperSettings:
        """Raises ValueError or TypeError for anything that to_json did not make."""
        return cls(**json.loads(data))


@dataclass(frozen=True)
class StartMessage:
    """The facts that a daemon gets from its keeper."""

    restarts: int
    """Daemons of this mount that ended unasked before this one."""
    answered_init: bytes | None
    """The kernel's INIT request, if an earlier daemon on this device answered it."""
    mount_id: str
    runtime_dir: str
    is_privileged: bool
    unprivileged_reason: str
    """One line where `is_privileged` is False."""

    def to_json(self) -> bytes:
        """One packet."""
        return json.dumps(
            {
                "restarts": self.restarts,
                "init": _encode_bytes(self.answered_init),
                "mount_id": self.mount_id,
                "runtime_dir": self.runtime_dir,
                "privileged": self.is_privileged,
                "why": self.unprivileged_reason,
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> StartMessage:
        """Raises ValueError for a packet that is no such message."""
        message = _parse_object(data)
        return cls(
            restarts=int(str(message.get("restarts", 0))),
            answered_init=_decode_bytes(message.get("init")),
            mount_id=str(message.get("mount_id", "")),
            runtime_dir=str(message.get("runtime_dir", "")),
            is_privileged=bool(message.get("privileged", True)),
            unprivileged_reason=str(message.get("why") or ""),
        )


@dataclass(frozen=True)
class DaemonMessage:
    """One thing that a daemon tells its keeper; the other fields keep their defaults."""

    is_ready: bool = False
    error: str | None = None
    """One line: the reason why the daemon will end."""
    answered_init: bytes | None = None
    """The kernel's INIT request, which the daemon has answered."""

    def to_json(self) -> bytes:
        """One packet."""
        message: dict[str, object] = {}
        if self.is_ready:
            message["ready"] = True
        if self.error is not None:
            message["error"] = self.error
        if self.answered_init is not None:
            message["init"] = _encode_bytes(self.answered_init)
        return json.dumps(message).encode()

    @classmethod
    def from_json(cls, data: bytes) -> DaemonMessage:
        """Raises ValueError for a packet that is no such message."""
        message = _parse_object(data)
        return cls(
            is_ready=message.get("ready") is True,
            error=" ".join(str(message["error"]).split()) if "error" in message else None,
            answered_init=_decode_bytes(message.get("init")),
        )


def _parse_object(data: bytes) -> dict[str, object]:
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    return message


def _encode_bytes(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _decode_bytes(text: object) -> bytes | None:
    return base64.b64decode(str(text)) if text else None
