"""`fusecache trace`: what programs ask of a mount, as it happens, and what it comes to in the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import click

from fusecache.cli import target
from fusecache.cli.output import print_error
from fusecache.config.model import default_runtime_dir
from fusecache.config.units import format_size
from fusecache.control import client, mounts
from fusecache.errors import ConfigError, ControlError, DaemonUnreachableError
from fusecache.telemetry.trace_summary import TraceSummary

_TIMEOUT = 30.0
_MAX_LISTED = 20
"""Lines per list of the summary; the JSON has all entries."""
_EXTRA_FIELDS = ("flags", "xattr", "command", "whence", "by")


@click.command("trace")
@click.argument("mountpoint")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line, the summary last.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the events into this file; the summary is printed as well.",
)
@click.option("--quiet", is_flag=True, help="Print only the summary.")
@click.option(
    "--exact",
    is_flag=True,
    help="No read-ahead: every page that a program touches is told, and costs a request. Much slower.",
)
@click.option(
    "--writes",
    is_flag=True,
    help="Also tell of attempts to write, which the kernel refuses by itself otherwise.",
)
def trace_command(
    mountpoint: str,
    command: tuple[str, ...],
    as_json: bool,
    output: Path | None,
    quiet: bool,
    exact: bool,
    writes: bool,
) -> int:
    """Show what programs do on MOUNTPOINT until ctrl-C, or until COMMAND ends, whose exit code is passed on.

    Lookups (also of names that don't exist), opens, reads, mappings, directories, attributes, as the kernel asks for
    them, and then per program what was read of which file, in which order and how. All programs are told of, not only
    COMMAND. Meanwhile reads go through the daemon.
    """
    mount = target.require_mount(mountpoint)
    with ExitStack() as stack:
        out: TextIO = sys.stderr if command else sys.stdout
        lines = out if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        show = _json_line if as_json else _text_line
        follower = _TracePrinter(lines, show, quiet)
        code = _print_trace(mount, command, follower, exact=exact, writes=writes)
        summary = follower.make_summary()
        if as_json:
            for stream in dict.fromkeys((lines, out)):
                print(json.dumps({"op": "summary", **summary}), file=stream)
        else:
            for line in summary_lines(summary):
                print(line, file=out)
        out.flush()
    return code


class _TracePrinter:
    """Prints the events of a stream, and sums them up."""

    def __init__(self, out: TextIO, format_event: Callable[[Mapping[str, Any]], str], quiet: bool) -> None:
        self.lost_events = 0
        self.seconds = 0.0
        self.unseen: Mapping[str, Any] = {}
        self._out = out
        self._format_event = format_event
        self._quiet = quiet
        self._summary = TraceSummary()

    def print_item(self, item: Any) -> None:
        if isinstance(item, dict):
            self.unseen = item
            for line in _unseen_warnings(item):
                print_error(line)
            return
        self._summary.add_events(item)
        for event in item:
            self.seconds = max(self.seconds, float(event.get("t", 0.0)))
            if not self._quiet:
                print(self._format_event(event), file=self._out)
        if item:
            self._out.flush()

    def make_summary(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "lost": self.lost_events, **self.unseen, **self._summary.to_dict()}


def _unseen_warnings(item: Mapping[str, Any]) -> Iterator[str]:
    if item.get("open_passthrough"):
        yield f"{item['open_passthrough']} files are open with passthrough: their reads are not seen until then"
    if item.get("hidden"):
        yield f"the kernel knows {item['hidden']} names from before: it answers for them by itself for a while"


def _print_trace(
    mount: mounts.Mount, command: Sequence[str], printer: _TracePrinter, *, exact: bool, writes: bool
) -> int:
    """Trace until the end of the stream; returns the exit code."""
    socket = mounts.find_control_socket(mount, default_runtime_dir())
    child: subprocess.Popen[bytes] | None = None
    stopped = False
    try:
        with (
            client.StreamedCall(socket, "trace", timeout=_TIMEOUT, exact=exact, writes=writes) as following,
            _interrupts_caught(bool(command)) as asked,
        ):
            for item in following:
                printer.print_item(item)
                if command and child is None:
                    child = _start_command(command)
                over = child is not None and child.poll() is not None
                if (over or asked()) and not stopped:
                    stopped = True
                    following.request_end()
            printer.lost_events = int((following.result or {}).get("lost", 0))
    except DaemonUnreachableError as error:
        print_error(f"{mount.mountpoint}: {error}: the trace ends here")
        return _exit_code(child) or 1
    except ControlError as error:
        raise ControlError(f"{mount.mountpoint}: {error}") from None
    return _exit_code(child)


def _start_command(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command)
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from None


def _exit_code(child: subprocess.Popen[bytes] | None) -> int:
    """The exit code of the command, after its end, as a shell tells it; 0 without a command."""
    if child is None:
        return 0
    code = child.wait()
    return 128 - code if code < 0 else code


@contextmanager
def _interrupts_caught(has_command: bool) -> Iterator[Callable[[], bool]]:
    """Until the end of the block ctrl-C ends the command, or, without a command, only sets what this yields; a second
    one raises KeyboardInterrupt."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked and not has_command:
            raise KeyboardInterrupt
        asked = not has_command

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _json_line(event: Mapping[str, Any]) -> str:
    return json.dumps(event)


def _text_line(event: Mapping[str, Any]) -> str:
    who = f"{event.get('comm') or '?'}[{event.get('pid')}]" if event.get("pid") else "-"
    parts = [
        f"{event.get('t', 0.0):11.6f}",
        escape_unprintable(who),
        str(event.get("op")),
        escape_unprintable(str(event.get("path"))),
    ]
    if "size" in event:
        parts.append(f"{event['size']} bytes" + (f" at {event['offset']}" if "offset" in event else ""))
    parts += [escape_unprintable(str(event[name])) for name in _EXTRA_FIELDS if name in event]
    if event.get("error"):
        parts.append(f"-> {event['error']}")
    if event.get("ms"):
        parts.append(f"({event['ms']:.1f} ms)")
    return " ".join(parts)


def escape_unprintable(text: str) -> str:
    """Text from names in a bucket, with every character escaped that a terminal would act on."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people."""
    yield ""
    yield f"{summary['events']} requests in {summary['seconds']:.1f} s" + (
        f", {summary['lost']} more were lost: they came faster than they could be shown"
        if summary["lost"]
        else ""
    )
    for program in summary["programs"]:
        names = " ".join(name or "?" for name in program["names"])
        yield ""
        yield f"{escape_unprintable(names)} [{program['pid']}], from {program['first']:.3f} s on"
        yield "  " + ", ".join(f"{count} {op}" for op, count in program["requests"].items())
        yield from _file_lines(program["files"])
        yield from _name_lines("stat or access, nothing more", program["looked_at"])
        yield from _name_lines("not there", program["missing"])
        failed = [
            {"path": f"{each['op']} {each['path']} -> {each['error']}", "count": each["count"]}
            for each in program["failed"]
        ]
        yield from _name_lines("failed", failed)


def _file_lines(files: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not files:
        return
    yield "  files, in the order of their first use:"
    for file in files[:_MAX_LISTED]:
        share = "" if file["share"] is None else f" ({file['share']:.0%} of it)"
        parts = [f"{file['opens']} opens", f"{file['reads']} reads of {format_size(file['bytes'])}{share}"]
        if file["reads"]:
            parts.append(file["pattern"])
        if file["mapped"]:
            parts.append("mapped")
        if file["hidden"]:
            parts.append("reads not seen (passthrough)")
        yield f"    {file['first']:8.3f} {escape_unprintable(file['path'])}: {', '.join(parts)}"
    yield from _omitted_line(files)


def _name_lines(title: str, names: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not names:
        return
    yield f"  {title}:"
    for each in names[:_MAX_LISTED]:
        yield f"    {escape_unprintable(each['path'])}" + (
            f" ({each['count']} times)" if each["count"] > 1 else ""
        )
    yield from _omitted_line(names)


def _omitted_line(found: Sequence[object]) -> Iterator[str]:
    if len(found) > _MAX_LISTED:
        yield f"    and {len(found) - _MAX_LISTED} more: --json has them all"
