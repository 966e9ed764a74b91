"""The types of the values of settings, and the base of the models. Pure but for looking up users and groups."""

from __future__ import annotations

import grp
import os
import pwd
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fusecache.config.units import parse_amount, parse_duration, parse_size
from fusecache.errors import ConfigError


def _validator_for(parse: Any) -> BeforeValidator:
    """A parser of ours as a pydantic validator, which wants ValueError."""

    def validate(value: Any) -> Any:
        try:
            return parse(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(validate)


def _parse_mode(value: Any) -> Any:
    if isinstance(value, str):
        if not re.fullmatch(r"(0o)?[0-7]{1,4}", value):
            raise ConfigError(f"{value!r} is not an octal mode like 0444")
        return int(value.removeprefix("0o"), 8)
    return value


def _parse_uid(value: Any) -> Any:
    if isinstance(value, str) and not value.isdecimal():
        try:
            return pwd.getpwnam(value).pw_uid
        except KeyError:
            raise ConfigError(f"there is no user {value!r} on this machine") from None
    return value


def _parse_gid(value: Any) -> Any:
    if isinstance(value, str) and not value.isdecimal():
        try:
            return grp.getgrnam(value).gr_gid
        except KeyError:
            raise ConfigError(f"there is no group {value!r} on this machine") from None
    return value


def _parse_path(value: Any) -> Any:
    if isinstance(value, str | Path):
        if not str(value) or "\0" in str(value):
            raise ConfigError("a path is needed")
        return Path(os.path.abspath(os.path.expanduser(value)))
    return value


Bytes = Annotated[int, _validator_for(parse_size)]
Amount = Annotated[int | str, _validator_for(parse_amount)]
Seconds = Annotated[float, _validator_for(parse_duration)]
Mode = Annotated[int, _validator_for(_parse_mode), Field(ge=0, le=0o777)]
Uid = Annotated[int, _validator_for(_parse_uid), Field(ge=0, lt=2**32 - 1)]
Gid = Annotated[int, _validator_for(_parse_gid), Field(ge=0, lt=2**32 - 1)]
AbsolutePath = Annotated[Path, _validator_for(_parse_path)]


class SettingsModel(BaseModel):
    """Base of all settings: frozen, and without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=False, strict=False
    )
