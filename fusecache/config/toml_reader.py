"""A TOML file as flat settings that know their line. Reads the file, and nothing else."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusecache.errors import ConfigError

_log = logging.getLogger(__name__)

_TABLE_LINE = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY_LINE = re.compile(r"""\s*([A-Za-z0-9_-]+|"[^"]*"|'[^']*')((?:\s*\.\s*[A-Za-z0-9_"'-]+)*)\s*=""")
_POSITION = re.compile(r"\s*\(at line (\d+), column \d+\)|\s*\(at end of document\)")
_OCTAL_KEYS = ("umask", "file_mode", "dir_mode")


@dataclass(frozen=True)
class LocatedSetting:
    """One value at `path` in the settings model, and `where` it was found (file and line, variable or option), for
    messages."""

    path: tuple[str, ...]
    value: Any
    where: str


@dataclass(frozen=True)
class SourceTable:
    """The settings of one source; `where` names the file and the line at which its table begins."""

    where: str
    settings: tuple[LocatedSetting, ...] = ()

    def get_value(self, key: str) -> Any:
        """The value that the table has for `key`, or None."""
        return next((setting.value for setting in self.settings if setting.path == (key,)), None)

    def with_settings(self, *settings: LocatedSetting) -> SourceTable:
        """This table with more settings, which win over its own."""
        return replace(self, settings=(*self.settings, *settings))


def read_toml(file: Path) -> tuple[list[LocatedSetting], list[SourceTable]]:
    """The mount's settings, and those of each source. Raises ConfigError naming file, line and key."""
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _malformed_error(file, text, str(error)) from None
    lines = dict(_index_key_lines(text))
    reader = _TomlReader(file, text, lines)
    sources = reader.read_sources(data)
    top = [
        setting
        for key, value in data.items()
        if key not in ("source", "sources")
        for setting in reader.read_settings((key,), value, nested=key in ("tuning", "peers"))
    ]
    given = [*top, *(setting for source in sources for setting in source.settings)]
    if any(setting.path[-1] in ("secret_access_key", "session_token", "secret") for setting in given):
        _warn_if_readable(file)
    return top, sources


class _TomlReader:
    def __init__(self, file: Path, text: str, lines: dict[tuple[str, ...], int]) -> None:
        self._file = file
        self._text = text.splitlines()
        self._lines = lines

    def location_of(self, path: tuple[str, ...]) -> str:
        line = next((self._lines[p] for p in _prefixes(path) if p in self._lines), None)
        return f"{self._file}, line {line}, {path[-1]}" if line else f"{self._file}, {path[-1]}"

    def read_settings(self, path: tuple[str, ...], value: Any, *, nested: bool) -> Iterator[LocatedSetting]:
        if nested:
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{self.location_of(path)}: is a table: write [{path[0]}] on a line of its own"
                )
            for key, item in value.items():
                yield from self.read_settings((*path, key), item, nested=False)
            return
        if path[-1] in _OCTAL_KEYS and isinstance(value, int):
            self._check_octal(path, value)
        yield LocatedSetting(path, value, self.location_of(path))

    def _check_octal(self, path: tuple[str, ...], value: int) -> None:
        line = self._text[self._lines[path] - 1] if path in self._lines else "0o"
        if value and "0o" not in line:
            raise ConfigError(f'{self.location_of(path)}: write the octal mode as 0o{value} or "0{value}"')

    def read_sources(self, data: dict[str, Any]) -> list[SourceTable]:
        found = []
        listed = data.get("source", [])
        named = data.get("sources", {})
        for key, value, expected in (("source", listed, (dict, list)), ("sources", named, (dict,))):
            if not isinstance(value, expected):
                raise ConfigError(
                    f"{self.location_of((key,))}: write [[source]] or [sources.NAME] on a line of its own"
                )
        at: list[tuple[str, ...]] = [("source",)]
        if isinstance(listed, dict):
            listed = [listed]
        else:
            at = [("source", str(number)) for number in range(len(listed))]
        for path, table in zip(at, listed, strict=True):
            found.append(self._read_table(path, table))
        for name, table in named.items():
            path = ("sources", name)
            made = self._read_table(path, table)
            if made.get_value("name") is not None:
                raise ConfigError(
                    f"{self.location_of((*path, 'name'))}: [sources.{name}] already says the name"
                )
            found.append(made.with_settings(LocatedSetting(("name",), name, self.location_of(path))))
        return found

    def _read_table(self, path: tuple[str, ...], table: Any) -> SourceTable:
        if not isinstance(table, dict):
            raise ConfigError(f"{self.location_of(path)}: has to be a table with a url")
        where = self.location_of(path).rpartition(", ")[0]
        return SourceTable(
            where,
            tuple(
                LocatedSetting((key,), value, self.location_of((*path, key))) for key, value in table.items()
            ),
        )


def _prefixes(path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for length in range(len(path), 0, -1):
        yield path[:length]


def _index_key_lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """(path, line number from 1) of tables and keys; tables of an array are numbered from 0."""
    table: tuple[str, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE_LINE.match(line):
            table = _split_dotted(header[2])
            if header[1] == "[[":
                index = counts.get(header[2], -1) + 1
                counts[header[2]] = index
                table = (*table, str(index))
            elif table[0] in counts and len(table) > 1:
                table = (table[0], str(counts[table[0]]), *table[1:])
            yield table, number
        elif key := _KEY_LINE.match(line):
            yield (*table, *_split_dotted(key[1] + key[2])), number


def _split_dotted(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _malformed_error(file: Path, text: str, message: str) -> ConfigError:
    lines = text.splitlines()
    position = _POSITION.search(message)
    number = int(position[1]) if position and position[1] else len(lines)
    # Only the key, never the line: what stands behind the '=' may be a secret.
    key = _KEY_LINE.match(lines[number - 1]) if 0 < number <= len(lines) else None
    named = f", {key[1]}" if key else ""
    return ConfigError(f"{file}, line {number}{named}: malformed TOML: {_POSITION.sub('', message)}")


def _warn_if_readable(file: Path) -> None:
    if file.stat().st_mode & 0o077:
        _log.warning("%s holds secrets and others may read it: chmod 600 %s", file, file)
