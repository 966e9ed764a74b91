"""The output of the commands: tables, progress bars, and one line for a mistake."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

_PIPE_WIDTH = 1000
"""Columns when the output is no terminal: a line is never folded, for grep and cut."""


def make_console() -> Console:
    """The console for results, on stdout."""
    return Console(
        width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False
    )


def print_error(message: str) -> None:
    """Print a message as one line on stderr."""
    print("fusecache: " + " ".join(message.split()), file=sys.stderr)


def print_json(value: object) -> None:
    """Print `value` as JSON on stdout."""
    print(json.dumps(value, indent=2, default=str))


def make_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A new, empty table without lines; `right` names the columns that are set to the right."""
    made = Table(box=None, pad_edge=False, show_header=True, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", no_wrap=True, overflow="ellipsis"
        )
    return made


def print_table(table: Table) -> None:
    """Print a table, without blanks at the ends of lines when it goes to a pipe."""
    out = make_console()
    if sys.stdout.isatty():
        out.print(table)
        return
    with out.capture() as captured:
        out.print(table)
    print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


def format_age(timestamp: float) -> str:
    """The time since an instant, given in seconds since the epoch, as text."""
    seconds = max(0, time.time() - timestamp)
    return f"{format_duration(seconds)} ago" if timestamp > 0 else "never"


def format_duration(seconds: float) -> str:
    """Seconds as text: "45 s", "3 min", "5 h", "12 d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class ProgressBar:
    """A progress bar that is moved to absolute positions."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def move_to(self, done: float, total: float | None = None) -> None:
        """Move to `done`; give the `total` when it becomes known."""
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def show_progress(title: str, total: float | None = None, *, unit: str = "") -> Iterator[ProgressBar]:
    """A progress bar on stderr for a long command, only on a terminal. `unit` "B" counts bytes and shows the
    speed; without a total it only shows that something goes on."""
    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
    ]
    if unit == "B":
        columns += [DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()]
    elif unit:
        columns += [MofNCompleteColumn(), TimeRemainingColumn()]
    disabled = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disabled) as shown:
        yield ProgressBar(shown, shown.add_task(title, total=total))
