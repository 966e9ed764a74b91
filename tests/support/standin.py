"""A stand-in for the daemon, for tests of the keeper: `standin.py DIRECTORY --device FD --clones ... --keeper FD ...`.

Serves a root with one file `file` in raw FUSE. Every start appends what the keeper told, with its own pid, to
DIRECTORY/told. DIRECTORY/mode says how it behaves: "serve", "error: TEXT" (reported, then status 1), "exit N",
"stuck" (never ready), "hang" (READs are never answered), "crash" (status 3 right after it was ready).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

HELLO = b"hello\n"
_ATTR = struct.Struct("<6Q10I")
_NO_REPLY = {2, 36, 42}


def attributes(nodeid: int) -> bytes:
    mode, size = (0o40555, 0) if nodeid == 1 else (0o100444, len(HELLO))
    return _ATTR.pack(nodeid, size, 1, 0, 0, 0, 0, 0, 0, mode, 2, os.getuid(), os.getgid(), 0, 4096, 0)


def answer(opcode: int, nodeid: int, body: bytes, mode: str) -> bytes | int | None:
    """The body of the reply, an errno, or None for no reply at all."""
    if opcode in _NO_REPLY or (opcode == 15 and mode == "hang"):
        return None
    if opcode == 26:
        return struct.pack("<4I2H2I2H8I", 7, 31, 65536, 0, 12, 9, 4096, 1, 0, 0, *[0] * 8)
    if opcode == 1:
        if body.rstrip(b"\0") != b"file":
            return errno.ENOENT
        return struct.pack("<4Q2I", 2, 0, 60, 60, 0, 0) + attributes(2)
    if opcode == 3:
        return struct.pack("<Q2I", 60, 0, 0) + attributes(nodeid)
    if opcode == 15:
        offset, size = struct.unpack_from("<QI", body, 8)
        return HELLO[offset : offset + size]
    if opcode == 17:
        return struct.pack("<5Q10I", 1 << 20, 0, 0, 1, 0, 4096, 255, 4096, 0, *[0] * 6)
    if opcode in (14, 27):
        return struct.pack("<Q2I", 0, 1 if opcode == 14 else 0, 0)  # direct_io: each read comes here
    if opcode in (18, 25, 28, 29, 34):
        return b""
    return errno.ENOSYS


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    for name in ("device", "keeper", "config"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--clones")
    given = parser.parse_args()
    keeper = socket.socket(fileno=given.keeper)
    told = json.loads(keeper.recv(1 << 20))
    mode = (given.directory / "mode").read_text()
    with (given.directory / "told").open("a") as file:
        file.write(json.dumps({**told, "pid": os.getpid()}) + "\n")
    with os.fdopen(given.config) as file:
        assert json.load(file)["sources"]
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
    if mode.startswith("error: "):
        keeper.send(json.dumps({"error": mode.removeprefix("error: ")}).encode())
        return 1
    if mode.startswith("exit "):
        return int(mode.split()[1])
    if mode == "stuck":
        signal.pause()
    keeper.send(json.dumps({"ready": True}).encode())
    if mode == "crash" and told["init"]:
        return 3
    while True:
        try:
            request = os.read(given.device, 1 << 20)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return 0
            continue  # an interrupted request
        _, opcode, unique, nodeid = struct.unpack_from("<IIQQ", request)
        found = answer(opcode, nodeid, request[40:], mode)
        if found is None:
            continue
        number, body = (found, b"") if isinstance(found, int) else (0, found)
        reply = struct.pack("<IiQ", 16 + len(body), -number, unique) + body
        with contextlib.suppress(FileNotFoundError):  # interrupted
            os.write(given.device, reply)
        if opcode == 26:
            keeper.send(json.dumps({"init": base64.b64encode(request).decode()}).encode())


if __name__ == "__main__":
    sys.exit(main())
