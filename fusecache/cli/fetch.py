"""`fusecache fetch` and `fusecache refresh`: have the daemon do now what it would do later."""

from __future__ import annotations

import threading
import time
from typing import Any

import click

from fusecache.cli import target
from fusecache.cli.output import show_progress
from fusecache.config.units import format_size
from fusecache.control import mounts
from fusecache.errors import ControlError

_POLL_INTERVAL = 0.25
"""Seconds between two requests for the progress: the bar moves smoothly."""
_STALL_TIMEOUT = 90.0
"""Seconds without a byte after which the command gives up: longer than a read's default deadline."""


@click.command("fetch")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--no-wait", is_flag=True, help="Only start it; fusecache status shows how it goes on.")
def fetch_command(paths: tuple[str, ...], no_wait: bool) -> int:
    """Fetch files or folders of a mount into the cache.

    Ends when all of it is there. An interrupted command does not stop the daemon from going on.
    """
    for path in paths:
        mount, below = target.require_containing_mount(path)
        answer = target.call_mount_daemon(mount, "fetch", path=below)
        if no_wait:
            continue
        _show_fetch_progress(mount, path, below, answer)
        print(f"{path}: {format_size(answer['total'])} in the cache")
    return 0


def _show_fetch_progress(mount: mounts.Mount, path: str, path_in_mount: str, answer: dict[str, Any]) -> None:
    """Show the progress until all is fetched. Raises ControlError when no byte has come for _STALL_TIMEOUT."""
    pause = threading.Event()
    moved, done = time.monotonic(), -1
    with show_progress(f"fetching {path}", unit="B") as bar:
        while answer["done"] < answer["total"]:
            bar.move_to(answer["done"], answer["total"])
            if answer["done"] != done:
                moved, done = time.monotonic(), answer["done"]
            elif time.monotonic() - moved > _STALL_TIMEOUT:
                raise ControlError(
                    f"{path}: no progress at {format_size(done)} of {format_size(answer['total'])}: "
                    f"fusecache status {mount.mountpoint} tells about space and errors"
                )
            pause.wait(_POLL_INTERVAL)
            answer = target.call_mount_daemon(mount, "fetch", path=path_in_mount)


@click.command("refresh")
@click.argument("mountpoint", required=False)
def refresh_command(mountpoint: str | None) -> int:
    """List the sources of MOUNTPOINT again, now."""
    mount = target.require_only_mount(mountpoint)
    with show_progress(f"listing the sources of {mount.mountpoint}"):
        answer = target.call_mount_daemon(mount, "refresh", timeout=600.0)
    print(f"{mount.mountpoint}: {answer['files']} files")
    return 0
