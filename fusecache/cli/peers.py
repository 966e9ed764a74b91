"""`fusecache peers`: the nodes of the cluster, how they are doing, and the objects that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fusecache.cli import target
from fusecache.cli.output import format_duration, make_table, print_json, print_table
from fusecache.config.model import default_runtime_dir
from fusecache.config.units import format_size
from fusecache.control import client, mounts

_TIMEOUT = 20.0


@click.command("peers")
@click.argument("mountpoint", required=False)
@click.option("--node", help="Ask the node of this name that `fusecache serve` runs on this machine.")
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="FUSECACHE_RUNTIME_DIR",
    help="With --node: its runtime_dir.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def peers_command(mountpoint: str | None, node: str | None, runtime_dir: Path | None, as_json: bool) -> int:
    """Show the nodes of the cluster that MOUNTPOINT, or the only mount, is part of.

    Members with their state, the latency of their answers, bytes in and out, share of the stripes; and how many
    bytes of each object which node holds.
    """
    if node is not None:
        directory = runtime_dir or default_runtime_dir()
        socket = mounts.control_socket_path(directory.absolute(), mounts.serve_mountpoint(node))
        report = client.call_daemon(socket, "peers", timeout=_TIMEOUT)
    else:
        report = target.call_mount_daemon(target.require_only_mount(mountpoint), "peers", timeout=_TIMEOUT)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def _print_report(report: Mapping[str, Any]) -> None:
    members = make_table(
        "node",
        "state",
        "latency",
        "in",
        "out",
        "share",
        "url",
        "remark",
        right=("latency", "in", "out", "share"),
    )
    for row in report["members"]:
        latency = row["latency"]
        remark = row["why"] or (f"avoided: {row['avoided']}" if row["avoided"] else "")
        if row["state"] == "dead" and row["seen"] is not None:
            remark = f"seen {format_duration(row['seen'])} ago: {remark}"
        members.add_row(
            row["name"] + (" (this)" if row["me"] else ""),
            row["state"],
            "" if latency is None else f"{latency * 1000:.1f} ms",
            format_size(row["bytes_in"]),
            format_size(row["bytes_out"]),
            f"{row['share']:.0%}",
            row["url"],
            remark,
        )
    print_table(members)
    if not report["coverage"]:
        return
    print()
    names = [row["name"] for row in report["members"] if row["state"] == "alive"]
    held = make_table("object", "size", *names, right=("size", *names))
    for item in report["coverage"]:
        shares = [
            f"{item['nodes'].get(name, 0) / item['size']:.0%}" if item["size"] else "100%" for name in names
        ]
        held.add_row(item["key"], format_size(item["size"]), *shares)
    print_table(held)
