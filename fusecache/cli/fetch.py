"""`fusecache fetch` and `fusecache refresh`: have the daemon do now what it would do later."""

from __future__ import annotations

import threading

import click

from fusecache.cli import target
from fusecache.cli.output import progress
from fusecache.config import format_size

_POLL = 0.25
"""Seconds between two questions for the progress: smooth enough to look at."""


@click.command("fetch")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--no-wait", is_flag=True, help="Only start it; fusecache status shows how it goes on.")
def fetch_command(paths: tuple[str, ...], no_wait: bool) -> int:
    """Fetch files or folders of a mount into the cache.

    Ends when all of it is there. An interrupted command does not stop the daemon from going on.
    """
    for path in paths:
        mount, below = target.around(path)
        answer = target.ask(mount, "fetch", path=below)
        if no_wait:
            continue
        pause = threading.Event()
        with progress(f"fetching {path}", unit="B") as bar:
            while answer["done"] < answer["total"]:
                bar.at(answer["done"], answer["total"])
                pause.wait(_POLL)
                answer = target.ask(mount, "fetch", path=below)
        print(f"{path}: {format_size(answer['total'])} in the cache")
    return 0


@click.command("refresh")
@click.argument("mountpoint", required=False)
def refresh_command(mountpoint: str | None) -> int:
    """List the sources of MOUNTPOINT again, now."""
    mount = target.only_mount(mountpoint)
    with progress(f"listing the sources of {mount.mountpoint}"):
        answer = target.ask(mount, "refresh", timeout=600.0)
    print(f"{mount.mountpoint}: {answer['files']} files")
    return 0
