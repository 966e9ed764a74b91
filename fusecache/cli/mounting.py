"""`fusecache mount` and `fusecache umount`.

The programs of fusecache_mount do the work, as subprocesses: they get the configuration in a memory file that no other
process inherits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from fusecache.cli.output import show_progress
from fusecache.config.load import load_mount_config
from fusecache.control.memfd import make_sealed_memfd

_PROGRAM_PREFIX = "fusecache_mount.lifecycle."
_LAUNCH_FLAGS = frozenset({"nonempty"})
"""Words of -o that tell the launcher how to mount; they are no settings of the mount."""
_WORDS_ADDED_BY_MOUNT8 = frozenset({"rw", "dev", "suid"})
"""Words that mount(8) and mount.fuse add by themselves; the user did not ask for them, and gets none of them."""


def is_mount_fuse_call(arguments: Sequence[str]) -> bool:
    """Whether these are the arguments of mount.fuse, `SOURCE MOUNTPOINT -o OPTIONS`, in place of a command's name.
    A source is a URL, a path, or a word that stands for the sources of a config file."""
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        return False
    source, mountpoint = arguments[:2]
    if "://" in source or source.startswith("/"):
        return True
    return source in ("none", "fusecache") and mountpoint.startswith("/") and "-o" in arguments[2:]


@click.command("mount")
@click.argument("places", nargs=-1, required=True, metavar="[SOURCE] MOUNTPOINT")
@click.option("-o", "options", multiple=True, metavar="KEY=VALUE,...", help="Options, see docs/OPTIONS.md.")
@click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), help="TOML file with settings and sources."
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground, log to stderr.")
@click.option("--mount8", is_flag=True, hidden=True, help="Called by mount(8), which adds words to -o.")
def mount_command(
    places: tuple[str, ...],
    options: tuple[str, ...],
    config: Path | None,
    foreground: bool,
    mount8: bool,
) -> int:
    """Mount SOURCE, like s3://bucket/prefix, on the directory MOUNTPOINT.

    Ends when the mount answers, or says why it can't. Without SOURCE, all sources of the config file are
    mounted, each in a folder of its name.
    """
    if len(places) > 2:
        raise click.UsageError(f"one SOURCE and one MOUNTPOINT, not {len(places)} arguments")
    source, mountpoint = places if len(places) == 2 else (None, places[0])
    words = [word for text in options for word in text.split(",") if word]
    own = _LAUNCH_FLAGS.intersection(words)
    dropped = own | (_WORDS_ADDED_BY_MOUNT8 if mount8 else frozenset())
    settings = load_mount_config(source, mountpoint, [w for w in words if w not in dropped], config)
    flags = [f"--{word}" for word in sorted(own)]
    fd = make_sealed_memfd("fusecache-config", settings.dump_with_secrets())
    try:
        command = _program_command("launch", "--config", str(fd), *flags)
        if foreground:
            os.set_inheritable(fd, True)
            sys.stdout.flush()
            os.execv(command[0], [*command, "--foreground"])  # noqa: S606  no process of ours in between
        with show_progress(f"mounting {source or 'the sources'} on {mountpoint}"):
            return _run_program(command, (fd,))
    finally:
        os.close(fd)


@click.command("umount")
@click.argument("mountpoint")
@click.option("-l", "--lazy", is_flag=True, help="Unmount now; open files go on until they are closed.")
@click.option(
    "--timeout", type=click.FloatRange(0, 3600), default=10.0, show_default=True, help="Seconds to wait."
)
def umount_command(mountpoint: str, lazy: bool, timeout: float) -> int:
    """Unmount MOUNTPOINT, also when its daemon is gone.

    Ends when the daemon has ended.
    """
    flags = ["--lazy"] if lazy else []
    with show_progress(f"unmounting {mountpoint}"):
        return _run_program(
            _program_command("unmount", "--timeout", str(timeout), *flags, "--", mountpoint), ()
        )


def _program_command(module: str, *arguments: str) -> list[str]:
    # -P: what lies in the current directory must not be imported
    return [sys.executable, "-P", "-m", _PROGRAM_PREFIX + module, *arguments]


def _run_program(command: list[str], descriptors: tuple[int, ...]) -> int:
    """Run a program and return its exit code. Its message is printed after its end, when the progress bar is gone. The
    terminal sends ctrl-C to the program, too."""
    with subprocess.Popen(command, pass_fds=descriptors, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while True:
            try:
                said += process.stderr.read()
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue  # the program cleans up, and says so
    sys.stderr.write(said.decode("utf-8", "replace"))
    sys.stderr.flush()
    return code if code >= 0 else 128 - code
