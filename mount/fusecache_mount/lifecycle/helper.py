"""The mount(8) helper: `mount.fusecache SOURCE MOUNTPOINT [-nsfvrw] [-t TYPE] [-N NAMESPACE] [-o OPTIONS]`.

Installed as /sbin/mount.fuse.fusecache and /sbin/mount.fusecache, it makes `mount -t fuse.fusecache` and lines of
fstab work. It translates the call to `fusecache mount`, and its exit status to mount(8)'s. The environment may be
empty: the helper needs neither PATH nor HOME.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

EXIT_USAGE = 1
EXIT_FAILED = 32
_IGNORED_FLAGS = frozenset("nsvrw")
"""No mtab, sloppy, verbose, read-only, read-write: the mount is so without being asked, or can't be so."""
_FLAGS_WITH_VALUE = frozenset("toN")


def translate_arguments(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments for `fusecache mount`, and whether to run it (False after -f). Raises ValueError, with one line,
    for arguments that mount(8) does not give."""
    words: list[str] = []
    options: list[str] = []
    really = True
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        letters = argument[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in _FLAGS_WITH_VALUE:
                value = letters or next(rest, None)
                if value is None:
                    raise ValueError(f"option -{letter} needs a value")
                if letter == "o":
                    options.append(value)
                letters = ""
            elif letter == "f":
                really = False
            elif letter not in _IGNORED_FLAGS:
                raise ValueError(f"unknown option -{letter}")
    if len(words) != 2:
        raise ValueError("a source and a mountpoint are needed")
    made = ["mount", "--mount8"]
    for option in options:
        made += ["-o", option]
    return [*made, "--", *words], really


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount for mount(8), and return its exit status: 0, 1 (usage) or 32 (failed)."""
    try:
        command, really = translate_arguments(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        usage = "mount.fusecache SOURCE MOUNTPOINT [-o OPTIONS]"
        print(f"fusecache: {error}: {usage}", file=sys.stderr)
        return EXIT_USAGE
    if not really:
        return 0
    code = subprocess.call([sys.executable, "-P", "-m", "fusecache.cli.main", *command])
    return {0: 0, 2: EXIT_USAGE}.get(code, EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main())
