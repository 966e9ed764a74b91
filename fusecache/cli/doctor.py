"""`fusecache doctor`: checks what this machine and this source allow, and says how to mend the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from fusecache.cli.checks import Check, run_local_checks
from fusecache.cli.output import print_json, show_progress
from fusecache.config.load import load_mount_config
from fusecache.config.model import default_cache_dir

_STATE_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor")
@click.argument("source", required=False)
@click.option("-o", "options", multiple=True, metavar="KEY=VALUE,...", help="Options as for mount.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="Configuration file.")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Cache directory to look at."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def doctor_command(
    source: str | None, options: Sequence[str], config: Path | None, cache_dir: Path | None, as_json: bool
) -> int:
    """Check the kernel, privileges, cache directory and SOURCE (a URL, or all sources of --config).

    Each line is ok, warn or fail, and says how to mend it. Exit code 1 when one failed.
    """
    settings = None
    if source is not None or config is not None:
        settings = load_mount_config(source, "/fusecache-doctor", options, config)
    directory = cache_dir or (settings.cache_dir if settings else default_cache_dir())
    checks = run_local_checks(directory, settings)
    if settings is not None:
        from fusecache.cli.checks_source import run_source_checks

        with show_progress("asking the sources"):
            for each in settings.sources:
                checks += run_source_checks(each, settings.tuning)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        _print_checks(checks)
    return 1 if any(check.state == "fail" for check in checks) else 0


def _print_checks(checks: Sequence[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = f"{check.state:<4}"
        if sys.stdout.isatty():
            state = click.style(state, fg=_STATE_COLOURS[check.state])
        mend = f": {check.mend}" if check.mend and check.state != "ok" else ""
        print(f"{state}  {check.name:<{width}}  {check.detail}{mend}")
