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

from fusecache import control, mounts
from fusecache.cli import target
from fusecache.cli.output import complain
from fusecache.config.units import format_size
from fusecache.errors import ConfigError, ControlError, DaemonUnreachableError
from fusecache.telemetry.trace import Summary

_TIMEOUT = 30.0
_LISTED = 20
"""Lines per list of the summary; the JSON has all."""
_EXTRA = ("flags", "xattr", "command", "whence", "by")


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
    mount = target.mounted(mountpoint)
    with ExitStack() as stack:
        out: TextIO = sys.stderr if command else sys.stdout
        lines = out if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        show = _json_line if as_json else _text_line
        follower = _Follower(lines, show, quiet)
        code = _follow(mount, command, follower, exact=exact, writes=writes)
        summary = follower.result()
        if as_json:
            for stream in dict.fromkeys((lines, out)):
                print(json.dumps({"op": "summary", **summary}), file=stream)
        else:
            for line in summary_lines(summary):
                print(line, file=out)
        out.flush()
    return code


class _Follower:
    """Takes the items of the stream: prints events, and sums them up."""

    def __init__(self, out: TextIO, show: Callable[[Mapping[str, Any]], str], quiet: bool) -> None:
        self.lost = 0
        self.seconds = 0.0
        self.before: Mapping[str, Any] = {}
        self._out = out
        self._show = show
        self._quiet = quiet
        self._summary = Summary()

    def take(self, item: Any) -> None:
        if isinstance(item, dict):
            self.before = item
            for line in _hidden(item):
                complain(line)
            return
        self._summary.add(item)
        for event in item:
            self.seconds = max(self.seconds, float(event.get("t", 0.0)))
            if not self._quiet:
                print(self._show(event), file=self._out)
        if item:
            self._out.flush()

    def result(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "lost": self.lost, **self.before, **self._summary.result()}


def _hidden(item: Mapping[str, Any]) -> Iterator[str]:
    if item.get("open_passthrough"):
        yield f"{item['open_passthrough']} files are open with passthrough: their reads are not seen until then"
    if item.get("hidden"):
        yield f"the kernel knows {item['hidden']} names from before: it answers for them by itself for a while"


def _follow(
    mount: mounts.Mount, command: Sequence[str], follower: _Follower, *, exact: bool, writes: bool
) -> int:
    """Until the end; returns the exit code."""
    socket = mounts.find_socket(mount)
    child: subprocess.Popen[bytes] | None = None
    stopped = False
    try:
        with (
            control.Following(socket, "trace", timeout=_TIMEOUT, exact=exact, writes=writes) as following,
            _stopped_by_signals(bool(command)) as asked,
        ):
            for item in following:
                follower.take(item)
                if command and child is None:
                    child = _start(command)
                over = child is not None and child.poll() is not None
                if (over or asked()) and not stopped:
                    stopped = True
                    following.stop()
            follower.lost = int((following.result or {}).get("lost", 0))
    except DaemonUnreachableError as error:
        complain(f"{mount.mountpoint}: {error}: the trace ends here")
        return _code(child) or 1
    except ControlError as error:
        raise ControlError(f"{mount.mountpoint}: {error}") from None
    return _code(child)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command)
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from None


def _code(child: subprocess.Popen[bytes] | None) -> int:
    """That of the command, when it has ended; the way a shell tells it."""
    if child is None:
        return 0
    code = child.wait()
    return 128 - code if code < 0 else code


@contextmanager
def _stopped_by_signals(has_command: bool) -> Iterator[Callable[[], bool]]:
    """Until the end of the block, ctrl-C is for the command, or, without one, asks for the end in good order."""
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
    parts = [f"{event.get('t', 0.0):11.6f}", plain(who), str(event.get("op")), plain(str(event.get("path")))]
    if "size" in event:
        parts.append(f"{event['size']} bytes" + (f" at {event['offset']}" if "offset" in event else ""))
    parts += [plain(str(event[name])) for name in _EXTRA if name in event]
    if event.get("error"):
        parts.append(f"-> {event['error']}")
    if event.get("ms"):
        parts.append(f"({event['ms']:.1f} ms)")
    return " ".join(parts)


def plain(text: str) -> str:
    """Text from names in a bucket, without what a terminal would act on."""
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
        yield f"{plain(names)} [{program['pid']}], from {program['first']:.3f} s on"
        yield "  " + ", ".join(f"{count} {op}" for op, count in program["requests"].items())
        yield from _files(program["files"])
        yield from _names("stat or access, nothing more", program["looked_at"])
        yield from _names("not there", program["missing"])
        failed = [
            {"path": f"{each['op']} {each['path']} -> {each['error']}", "count": each["count"]}
            for each in program["failed"]
        ]
        yield from _names("failed", failed)


def _files(files: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not files:
        return
    yield "  files, in the order of their first use:"
    for file in files[:_LISTED]:
        share = "" if file["share"] is None else f" ({file['share']:.0%} of it)"
        parts = [f"{file['opens']} opens", f"{file['reads']} reads of {format_size(file['bytes'])}{share}"]
        if file["reads"]:
            parts.append(file["pattern"])
        if file["mapped"]:
            parts.append("mapped")
        if file["hidden"]:
            parts.append("reads not seen (passthrough)")
        yield f"    {file['first']:8.3f} {plain(file['path'])}: {', '.join(parts)}"
    yield from _more(files)


def _names(title: str, names: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not names:
        return
    yield f"  {title}:"
    for each in names[:_LISTED]:
        yield f"    {plain(each['path'])}" + (f" ({each['count']} times)" if each["count"] > 1 else "")
    yield from _more(names)


def _more(found: Sequence[object]) -> Iterator[str]:
    if len(found) > _LISTED:
        yield f"    and {len(found) - _LISTED} more: --json has them all"
