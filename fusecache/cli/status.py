"""`fusecache status`: how a mount is doing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from fusecache.cli import target
from fusecache.cli.output import format_duration, print_error, print_json, print_table
from fusecache.config.units import format_size
from fusecache.control import mounts
from fusecache.errors import ControlError

_TIMEOUT = 10.0


@click.command("status")
@click.argument("mountpoint", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for MOUNTPOINT, else a list.")
def status_command(mountpoint: str | None, as_json: bool) -> int:
    """Show how MOUNTPOINT, or every fusecache mount, is doing.

    Exit code 1 when it is not mounted or its daemon does not answer.
    """
    if mountpoint is not None:
        answer = target.call_mount_daemon(target.require_mount(mountpoint), "status", timeout=_TIMEOUT)
        if as_json:
            print_json(answer)
        else:
            print_status(answer)
        return 0
    answers, failed = [], False
    for mount in mounts.list_mounts():
        try:
            answers.append(target.call_mount_daemon(mount, "status", timeout=_TIMEOUT))
        except ControlError as error:
            print_error(str(error))
            failed = True
    if as_json:
        print_json(answers)
    else:
        for number, answer in enumerate(answers):
            if number:
                print()
            print_status(answer)
        if not answers and not failed:
            print("no fusecache mounts")
    return 1 if failed else 0


def print_status(status: Mapping[str, Any]) -> None:
    """Print one status as a table of titles and texts."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for title, text in status_rows(status):
        grid.add_row(title, Text(text))
    print_table(grid)


def status_rows(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, text) of each section of the status; sections that a daemon of another version lacks are left out."""
    yield "mount", str(status.get("mountpoint", "?"))
    for source in _source_texts(status):
        yield "source", source
    mode = status.get("mode", {})
    if mode:
        yield "mode", str(mode.get("now", "?")) + (f": {mode['why']}" if mode.get("why") else "")
    if status.get("tracing"):
        yield "trace", "running: meanwhile new opens are served by the daemon"
    served = status.get("bytes", {})
    if served:
        yield "served", ", ".join(f"{format_size(served[tier])} from {tier}" for tier in served)
    opens = status.get("opens", {})
    if opens:
        yield "opens", ", ".join(f"{opens[by]} {by}" for by in opens)
    yield from _cache_rows(status.get("cache", {}))
    yield from _work_rows(status)
    process = status.get("process", {})
    if process:
        parts = [f"pid {process.get('pid', '?')}"]
        if "rss" in process:
            parts.append(f"{format_size(process['rss'])} memory")
        if "cpu_seconds" in process:
            parts.append(f"{process['cpu_seconds']:.1f} s CPU")
        if "uptime" in process:
            parts.append(f"up {format_duration(process['uptime'])}")
        if process.get("restarts"):
            parts.append(f"restarted {process['restarts']} times")
        yield "daemon", ", ".join(parts)


def _source_texts(status: Mapping[str, Any]) -> Iterator[str]:
    found = status.get("sources", status.get("source", []))
    for source in [found] if isinstance(found, str | dict) else found:
        if isinstance(source, str):
            yield source
            continue
        name = f"{source['name']}/: " if source.get("name") else ""
        engine = f" ({source['engine']})" if source.get("engine") else ""
        yield f"{name}{source.get('identity') or source.get('url', '?')}{engine}"


def _format_fill(used: int, limit: int) -> str:
    share = f" ({used / limit:.0%})" if limit else ""
    return f"{format_size(used)} of {format_size(limit)}{share}"


def _cache_rows(cache: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not cache:
        return
    memory = cache.get("memory_limit", 0)
    where = f" in {cache['dir']}" if cache.get("dir") else ""
    used = cache.get("memory_used", 0)
    if memory:
        yield "memory", _format_fill(used, memory) + (where if memory == cache.get("limit") else "")
    if not memory or memory < cache.get("limit", 0):
        yield "cache", _format_fill(cache.get("used", 0) - used, cache.get("limit", 0) - memory) + where
    text = f"{cache.get('objects_complete', 0)} complete, {cache.get('objects_partial', 0)} partial"
    if cache.get("evictions"):
        text += f", {cache['evictions']} evicted"
    if cache.get("corrupt_blocks"):
        text += f", {cache['corrupt_blocks']} damaged blocks fetched again"
    yield "objects", text
    if cache.get("objects_quarantined"):
        count = cache["objects_quarantined"]
        yield (
            "warning",
            f"{count} files are not what their manifest says: fusecache ls names them, the log says more",
        )
    if cache.get("sick"):
        yield "warning", "the cache disk fails and is bypassed: see the log"


def _work_rows(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    origin = status.get("origin", {})
    if origin:
        text = f"{origin.get('requests', 0)} requests"
        text += f", {origin.get('errors', 0)} errors, {origin.get('throttled', 0)} throttled"
        if "bytes" in origin:
            text += f", {format_size(origin['bytes'])} received"
        yield "origin", text
    loader = status.get("loader", {})
    if loader:
        text = f"{loader.get('fetching', 0)} files being fetched"
        text += f", {format_size(loader.get('bytes_to_fetch', 0))} to go"
        text += f", {loader.get('waiting_reads', 0)} reads waiting"
        yield "loading", text
    orders = status.get("orders", {})
    if orders:
        text = f"{orders.get('stored', 0)} stored, {orders.get('recorded', 0)} recorded"
        text += f", {orders.get('replayed', 0)} loads replayed"
        if orders.get("replaying"):
            text += f", {orders['replaying']} just now"
        if orders.get("wrong"):
            text += f", {orders['wrong']} of them read otherwise"
        if orders.get("from_nodes"):
            text += f", {orders['from_nodes']} from other nodes"
        yield "learned", text
    catalog = status.get("catalog", {})
    if catalog:
        text = f"{catalog.get('files', 0)} files, {format_size(catalog.get('bytes', 0))}"
        if catalog.get("age") is not None:
            text += f", listed {format_duration(catalog['age'])} ago"
        yield "tree", text
    errors = {kind: count for kind, count in (status.get("errors") or {}).items() if count}
    if errors:
        yield "errors", ", ".join(f"{count} {kind}" for kind, count in errors.items())
