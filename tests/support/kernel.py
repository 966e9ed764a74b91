"""`python -m tests.support.kernel` prints one line for each thing that this machine lacks for the tests, and fails."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.support import live
from tests.support.mounting import mounted


def missing() -> list[str]:
    """A line for each thing that can't be tested here: access to /dev/fuse, and passthrough."""
    if not os.path.exists("/dev/fuse"):
        return [
            "/dev/fuse is missing: 'modprobe fuse' on the host, or start the container with --device /dev/fuse"
        ]
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return ["/dev/fuse is closed to this user: as root, chmod 666 /dev/fuse"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "source").mkdir()
        try:
            with mounted(f"file://{work / 'source'}", work) as mount:
                mode = live.status(mount)["mode"]
        except AssertionError as error:
            return [f"a mount fails here: {error}"]
    if mode["now"] == "passthrough":
        return []
    return [f"no passthrough here: {mode['why']} (it needs Linux 6.9 and CAP_SYS_ADMIN)"]


if __name__ == "__main__":
    found = missing()
    print("\n".join(found))
    sys.exit(bool(found))
