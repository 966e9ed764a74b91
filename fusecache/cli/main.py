"""The `fusecache` command: finds the subcommand, and turns errors into one line and an exit code.

A mistake is one line on stderr and exit code 2 when the command line was wrong, 1 otherwise; never a
traceback, unless FUSECACHE_DEBUG is set.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import fusecache
from fusecache.cli.output import print_error
from fusecache.errors import ConfigError, FusecacheError

_COMMAND_FUNCTIONS = {
    "mount": ("fusecache.cli.mounting", "mount_command"),
    "umount": ("fusecache.cli.mounting", "umount_command"),
    "serve": ("fusecache.cli.serve", "serve_command"),
    "peers": ("fusecache.cli.peers", "peers_command"),
    "status": ("fusecache.cli.status", "status_command"),
    "trace": ("fusecache.cli.trace", "trace_command"),
    "doctor": ("fusecache.cli.doctor", "doctor_command"),
    "fetch": ("fusecache.cli.fetch", "fetch_command"),
    "refresh": ("fusecache.cli.fetch", "refresh_command"),
    "ls": ("fusecache.cli.cache", "ls_command"),
    "evict": ("fusecache.cli.cache", "evict_command"),
    "pin": ("fusecache.cli.cache", "pin_command"),
    "unpin": ("fusecache.cli.cache", "unpin_command"),
}
"""The module of a command is imported when it is called: `status` must not wait for the import of an S3 library."""


class _CommandGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _) in _COMMAND_FUNCTIONS.items() if importlib.util.find_spec(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module, attribute = _COMMAND_FUNCTIONS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], names, 1)
            hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(names)}"
            raise click.UsageError(f"no command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fusecache.__version__, prog_name="fusecache", message="%(prog)s %(version)s")
def cli() -> None:
    """Mount object storage and read from it at the speed of the local disk.

    \b
    fusecache mount s3://models /models
    fusecache status /models
    fusecache umount /models
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    try:
        code = _dispatch_command(list(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output has seen enough: nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort):
        print_error("interrupted")
        return 130
    except Exception as error:
        if os.environ.get("FUSECACHE_DEBUG"):
            raise
        return _report_error(error)


def _dispatch_command(arguments: list[str]) -> int:
    if importlib.util.find_spec("fusecache.cli.mounting"):
        mounting: Any = importlib.import_module("fusecache.cli.mounting")
        if mounting.is_mount_fuse_call(arguments):
            arguments[:0] = ["mount", "--mount8"]
    result = cli.main(arguments, prog_name="fusecache", standalone_mode=False)
    return result if isinstance(result, int) else 0


def _report_error(error: Exception) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.ctx.get_help() if error.ctx is not None else error.format_message(), err=True)
        return 2
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "fusecache"
        print_error(f"{error.format_message().rstrip('.')} (see {command} --help)")
        return 2
    if isinstance(error, click.ClickException):
        print_error(error.format_message())
        return error.exit_code
    if isinstance(error, ConfigError):
        print_error(str(error))
        return 2
    if isinstance(error, FusecacheError):
        print_error(str(error))
        return 1
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        print_error(f"{named}{error.strerror}")
        return 1
    # The text of an unforeseen error may hold anything, credentials too.
    print_error(f"unexpected {type(error).__name__}: this is a bug; FUSECACHE_DEBUG=1 shows where")
    return 1


if __name__ == "__main__":
    main()
