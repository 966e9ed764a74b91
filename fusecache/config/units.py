"""Sizes, shares and durations as people write them. Pure."""

from __future__ import annotations

import re

from fusecache.errors import ConfigError

_POWER_BY_PREFIX = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgtp]?)(i?b)?)", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.IGNORECASE)
_SECONDS_BY_UNIT = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str | int) -> int:
    """Bytes in "500GiB", "500G" (binary, like GiB), "500GB" (decimal), "4096". Raises ConfigError."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ConfigError(f"{text} is not a size: it is negative")
        return text
    match = _SIZE.fullmatch(str(text).strip())
    if not match or isinstance(text, bool):
        raise ConfigError(f"{text!r} is not a size: write it like 500GiB, 64MiB or 4096")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" and prefix else 1024
    factor = base ** _POWER_BY_PREFIX[prefix.lower()]
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def parse_amount(text: str | int) -> int | str:
    """A size in bytes, or a share of a file system as a normal string such as "80%". Raises ConfigError."""
    match = _PERCENT.fullmatch(str(text).strip())
    if not match:
        try:
            return parse_size(text)
        except ConfigError as error:
            raise ConfigError(f"{error} or as a share of the disk like 80%") from None
    share = float(match[1])
    if share > 100:
        raise ConfigError(f"{text!r} is more than the whole disk")
    return f"{share:g}%"


def resolve_amount(amount: int | str, total: int) -> int:
    """Bytes of an amount as parse_amount returns it, out of `total` bytes."""
    return amount if isinstance(amount, int) else int(total * float(amount.rstrip("%")) / 100)


def parse_duration(text: str | float) -> float:
    """Seconds in "60", "90s", "5m", "1.5h", "100ms", "2d". Raises ConfigError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        if not 0 <= text < float("inf"):
            raise ConfigError(f"{text} is not a duration: it has to be finite and not negative")
        return float(text)
    match = _DURATION.fullmatch(str(text).strip())
    if not match or isinstance(text, bool):
        raise ConfigError(f"{text!r} is not a duration: write it like 30s, 5m, 1h or 250ms")
    return float(match[1]) * _SECONDS_BY_UNIT[match[2].lower()]


def format_size(nbytes: int) -> str:
    """`nbytes` for people: "0 B", "1.5 KiB", "512 MiB", "12.3 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1023.95 or unit == "PiB":
            break
        value /= 1024
    digits = f"{value:.1f}".removesuffix(".0")
    return f"{digits} {unit}"
