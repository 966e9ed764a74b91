"""Settings from a TOML file, FUSECACHE_* variables and -o options: later ones win.

Every value keeps its place, so that an error names the file, line and key, the variable or the option.
"""

from __future__ import annotations

import difflib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fusecache.config.model import (
    MountConfig,
    SourceConfig,
    Tuning,
    default_cache_dir,
    default_runtime_dir,
)
from fusecache.config.peer_settings import PeerSettings
from fusecache.config.toml_reader import LocatedSetting, SourceTable, read_toml
from fusecache.errors import ConfigError

ENV_PREFIX = "FUSECACHE_"
_NON_SETTING_VARIABLES = frozenset({"DEBUG", "PYTHON", "CONFIG"})
"""Variables with the prefix that are no settings; unknown ones that look like no setting are let be."""

SETTING_TABLES: dict[str, type[BaseModel]] = {"tuning": Tuning, "peers": PeerSettings}
"""Tables of settings: [NAME] in the file, FUSECACHE_NAME__KEY; with -o KEY for tuning, NAME.KEY for others."""
MOUNT_KEYS = tuple(
    key for key in MountConfig.model_fields if key not in ("sources", "mountpoint", *SETTING_TABLES)
)
TUNING_KEYS = tuple(Tuning.model_fields)
SOURCE_KEYS = tuple(key for key in SourceConfig.model_fields if key not in ("name", "url"))
SECRET_KEYS = ("access_key_id", "secret_access_key", "session_token", "storage_options", "peers.secret")

IGNORED_OPTIONS = frozenset(
    (
        "ro",
        "defaults",
        "_netdev",
        "auto",
        "noauto",
        "nofail",
        "user",
        "nouser",
        "users",
        "group",
        "owner",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
        "dev",
        "nodev",
        "suid",
        "nosuid",
        "exec",
        "noexec",
        "sync",
        "async",
        "dirsync",
        "iversion",
        "noiversion",
        "silent",
        "loud",
        "mand",
        "nomand",
    )
)
"""Words of mount(8) that a read-only network file system may be given and that change nothing here."""

_PRIVATE_SETTING_ADVICE = (
    "put it into a config file of mode 0600 or the environment: every user can read the mount table"
)


def load_mount_config(
    source: str | None,
    mountpoint: str | Path,
    options: Sequence[str] = (),
    config_file: Path | None = None,
    env: Mapping[str, str] = os.environ,
    *,
    mount8: bool = False,
) -> MountConfig:
    """The settings of one mount.

    `source` is a URL, the name of a source in the file (which is then mounted alone), or None for all
    sources of the file. `options` are -o arguments, each "key=value,flag"; `config=FILE` among them names
    the file too. `mount8`: the options come from mount(8), which writes `rw` where the user wrote neither rw
    nor ro; otherwise `rw` is refused. Raises ConfigError.
    """
    given = [item for item in _split_options(options) if not (mount8 and item == ("rw", None))]
    for name, value in given:
        if name == "config" and config_file is None:
            if not value:
                raise ConfigError("-o config: a file is needed: config=/etc/fusecache.toml")
            config_file = Path(value)
    if config_file is None and env.get(ENV_PREFIX + "CONFIG"):
        config_file = Path(env[ENV_PREFIX + "CONFIG"])
    top, tables = read_toml(config_file) if config_file else ([], [])
    for setting in top:
        _check_top_level(setting)
    for table in tables:
        for setting in table.settings:
            _check_key(setting, setting.path[0], tuple(SourceConfig.model_fields))
    chosen = _choose_sources(source, tables, config_file)
    settings = [*top]
    for setting in (*_settings_from_env(env, chosen), *_settings_from_options(given, chosen)):
        if setting.path[0] == "source":
            number = int(setting.path[1])
            chosen[number] = chosen[number].with_settings(
                LocatedSetting(setting.path[2:], setting.value, setting.where)
            )
        else:
            settings.append(setting)
    return _build_config(settings, chosen, mountpoint, env)


def _choose_sources(source: str | None, tables: list[SourceTable], file: Path | None) -> list[SourceTable]:
    if source in (None, "", "none", "fusecache") and (tables or not source):
        if not tables:
            said = f"{file} names no source: add [[source]] with a url" if file else "no source: give a URL"
            raise ConfigError(said)
        return list(tables)
    assert source is not None
    named = [table for table in tables if table.get_value("name") == source]
    same = [table for table in tables if str(table.get_value("url") or "").rstrip("/") == source.rstrip("/")]
    bare = [table for table in tables if table.get_value("url") is None and not table.get_value("name")]
    root = LocatedSetting(("name",), "", "SOURCE")
    if named:
        return [named[0].with_settings(root)]
    if "://" not in source and not source.startswith("/"):
        names = [str(table.get_value("name")) for table in tables if table.get_value("name")]
        raise ConfigError(
            f"{source}: not a URL like s3://bucket/prefix"
            + (f", nor a source in {file}{_nearest_key_text(source, names)}" if file else "")
        )
    base = (same or bare or [SourceTable("SOURCE")])[0]
    return [base.with_settings(LocatedSetting(("url",), source, "SOURCE"), root)]


def _check_top_level(setting: LocatedSetting) -> None:
    key = setting.path[0]
    if key in SETTING_TABLES:
        _check_key(setting, setting.path[-1], tuple(SETTING_TABLES[key].model_fields))
    elif key == "mountpoint":
        raise ConfigError(f"{setting.where}: the mountpoint is an argument of the mount command")
    elif key in TUNING_KEYS:
        raise ConfigError(f"{setting.where}: belongs below a line [tuning]")
    elif key in SOURCE_KEYS or key == "url":
        raise ConfigError(f"{setting.where}: belongs below a line [[source]]")
    else:
        _check_key(setting, key, (*MOUNT_KEYS, *SETTING_TABLES, "source"))


def _check_key(setting: LocatedSetting, key: str, valid: Sequence[str]) -> None:
    if key not in valid:
        raise ConfigError(f"{setting.where}: unknown option{_nearest_key_text(key, valid)}")


def _nearest_key_text(word: str, valid: Sequence[str]) -> str:
    found = difflib.get_close_matches(word.lower(), valid, 1, 0.5)
    if found:
        return f": did you mean {found[0]}?"
    nearest = difflib.get_close_matches(word.lower(), valid, 1, 0.0)
    return f": the nearest is {nearest[0]}" if nearest else ""


# -- the environment


def _settings_from_env(env: Mapping[str, str], chosen: list[SourceTable]) -> Iterable[LocatedSetting]:
    for variable in sorted(env):
        if not variable.startswith(ENV_PREFIX):
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        head, _, rest = key.partition("__")
        value = env[variable]
        if key.upper() in _NON_SETTING_VARIABLES:
            continue
        if key in MOUNT_KEYS:
            yield LocatedSetting((key,), value, variable)
        elif head in SETTING_TABLES and rest:
            setting = LocatedSetting((head, rest), value, variable)
            _check_key(setting, rest, tuple(SETTING_TABLES[head].model_fields))
            yield setting
        elif head == "sources" and rest:
            name, _, rest = rest.rpartition("__")
            for number, table in enumerate(chosen):
                if str(table.get_value("name") or "").lower().replace("-", "_") == name:
                    setting = LocatedSetting(
                        ("source", str(number), rest), _decode_value(rest, value, variable), variable
                    )
                    _check_key(setting, rest, SOURCE_KEYS)
                    yield setting
        elif key in SOURCE_KEYS:
            _require_single_source(chosen, variable)
            yield LocatedSetting(("source", "0", key), _decode_value(key, value, variable), variable)
        else:
            near = difflib.get_close_matches(key, (*MOUNT_KEYS, *SOURCE_KEYS, *TUNING_KEYS), 1, 0.8)
            if near:
                prefix = "TUNING__" if near[0] in TUNING_KEYS else ""
                raise ConfigError(
                    f"{variable}: unknown setting: did you mean {ENV_PREFIX}{prefix}{near[0].upper()}?"
                )


def _decode_value(key: str, value: str, variable: str) -> Any:
    if key != "storage_options":
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ConfigError(f"{variable}: has to be a JSON object") from None


def _require_single_source(chosen: list[SourceTable], where: str) -> None:
    if len(chosen) > 1:
        raise ConfigError(
            f"{where}: there are several sources: set it below each [[source]] of the config file"
        )


# -- -o options


def _split_options(options: Sequence[str]) -> Iterable[tuple[str, str | None]]:
    for text in options:
        for word in text.split(","):
            name, equals, value = word.strip().partition("=")
            if name:
                yield name, value if equals else None


def _settings_from_options(
    given: Iterable[tuple[str, str | None]], chosen: list[SourceTable]
) -> Iterable[LocatedSetting]:
    for name, value in given:
        where = f"-o {name}"
        path: tuple[str, ...]
        if name in IGNORED_OPTIONS or name.startswith(("x-", "X-", "comment")) or name == "config":
            continue
        if name == "rw":
            raise ConfigError("-o rw: fusecache is a read-only file system: drop rw or write ro")
        if name in SECRET_KEYS:
            raise ConfigError(f"-o {name}: not allowed here: {_PRIVATE_SETTING_ADVICE}")
        model: type[BaseModel]
        table, _, rest = name.partition(".")
        if table in SETTING_TABLES and rest in SETTING_TABLES[table].model_fields and name not in SECRET_KEYS:
            path, model, name = (table, rest), SETTING_TABLES[table], rest
        elif name in MOUNT_KEYS:
            path, model = (name,), MountConfig
        elif name in TUNING_KEYS:
            path, model = ("tuning", name), Tuning
        elif name in SOURCE_KEYS:
            _require_single_source(chosen, where)
            path, model = ("source", "0", name), SourceConfig
        else:
            valid = (
                *MOUNT_KEYS,
                *TUNING_KEYS,
                *(f"peers.{key}" for key in PeerSettings.model_fields if f"peers.{key}" not in SECRET_KEYS),
                *(key for key in SOURCE_KEYS if key not in SECRET_KEYS),
                "config",
            )
            raise ConfigError(f"{where}: unknown option{_nearest_key_text(name, valid)}")
        if value is None and not _allows_type(model.model_fields[name].annotation, bool):
            raise ConfigError(f"{where}: needs a value: {name}=...")
        yield LocatedSetting(path, True if value is None else value, where)


def _allows_type(annotation: Any, required: type) -> bool:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_allows_type(item, required) for item in typing.get_args(annotation))
    return annotation is required


# -- all together


def _build_config(
    settings: list[LocatedSetting], tables: list[SourceTable], mountpoint: str | Path, env: Mapping[str, str]
) -> MountConfig:
    where: dict[tuple[str, ...], str] = {("mountpoint",): "mountpoint"}
    values: dict[str, Any] = {
        "mountpoint": str(mountpoint),
        "cache_dir": default_cache_dir(env),
        "runtime_dir": default_runtime_dir(env),
        "sources": [],
        **{name: {} for name in SETTING_TABLES},
    }
    for setting in settings:
        place = values[setting.path[0]] if setting.path[0] in SETTING_TABLES else values
        place[setting.path[-1]] = setting.value
        where[setting.path] = setting.where
    for number, table in enumerate(tables):
        source: dict[str, Any] = {}
        for setting in table.settings:
            source[setting.path[0]] = setting.value
            where["sources", str(number), setting.path[0]] = setting.where
        values["sources"].append(source)
        where["sources", str(number)] = table.where
    try:
        return MountConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            _first_error_text(error.errors(include_url=False, include_input=False), where)
        ) from None


def _first_error_text(errors: list[ErrorDetails], where: Mapping[tuple[str, ...], str]) -> str:
    error = errors[0]
    path = tuple(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = f"{path[-1]} is missing"
        path = path[:-1]
    elif error["type"] == "literal_error":
        message = f"has to be one of {error['ctx']['expected']}"
    elif not error["type"].startswith("value_error"):
        message = message[:1].lower() + message[1:]
    for length in range(len(path), 0, -1):
        if path[:length] in where:
            return f"{where[path[:length]]}: {message}"
    return message
