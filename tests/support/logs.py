"""Logs of the daemons that a test starts: a warning or a traceback in one fails the test, unless it is expected.

@pytest.mark.expected_log(r"the origin does not answer")     # a regular expression, searched in each line
def test_that_provokes_it(...): ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

_LINE = re.compile(r"^\d{4}-\d\d-\d\dT\S+ (debug|info|warning|error|critical) +\S+: ")
_FINE = {"debug", "info"}


class LogWatch:
    """Reads what is appended to log files, once."""

    def __init__(self) -> None:
        self._read: dict[Path, int] = {}
        """Bytes read so far of each file."""
        self._patterns: set[tuple[Path, str]] = set()
        self._expected: list[str] = []

    def watch(self, directory: Path, pattern: str) -> None:
        """From now on read the files in this directory that match the pattern, like `*/log`, also later ones."""
        self._patterns.add((directory, pattern))

    def expect(self, pattern: str) -> None:
        """Lines in which this regular expression is found alarm nobody, until the next `take_alarms`."""
        self._expected.append(pattern)

    def take_alarms(self, expected: Iterable[str] = ()) -> list[str]:
        """The alarming lines since the last call that nothing expects, neither `expect` nor these expressions."""
        patterns, self._expected = [*expected, *self._expected], []
        return unexpected(self.new_lines(), patterns)

    def new_lines(self) -> list[str]:
        """The lines that came since the last call, those of an unfinished line included."""
        found = []
        for directory, pattern in sorted(self._patterns):
            for file in sorted(directory.glob(pattern)):
                with file.open("rb") as log:
                    log.seek(self._read.get(file, 0))
                    data = log.read()
                    self._read[file] = log.tell()
                found += data.decode("utf-8", "replace").splitlines()
        return found


WATCH = LogWatch()
"""Of this process: mounts that outlive a test are watched on in the next."""


def is_alarming(line: str) -> bool:
    """Whether a line is a warning, an error, or nothing that a logger wrote: a traceback, or words of a library."""
    if line.startswith("{"):
        try:
            return json.loads(line)["level"] not in _FINE
        except (ValueError, KeyError, TypeError):
            return True
    matched = _LINE.match(line)
    return bool(line.strip()) and (matched is None or matched[1] not in _FINE)


def unexpected(lines: Iterable[str], expected: Iterable[str]) -> list[str]:
    """The alarming lines in which none of the expected regular expressions is found."""
    patterns = [re.compile(pattern) for pattern in expected]
    return [line for line in lines if is_alarming(line) and not any(p.search(line) for p in patterns)]
