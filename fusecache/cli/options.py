"""Writes the option reference, docs/OPTIONS.md, from the settings model: `python -m fusecache.cli.options`.

An argument names another file to write. A test compares docs/OPTIONS.md with the text that this module makes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from fusecache.config.load import IGNORED_OPTIONS, SECRET_KEYS
from fusecache.config.model import MountConfig, SourceConfig, Tuning
from fusecache.config.peer_settings import PeerSettings
from fusecache.config.units import format_size
from fusecache.config.value_types import Amount, Bytes, Gid, Mode, Seconds, Uid
from fusecache.telemetry.metrics import METRICS

_INTRODUCTION = """\
# Options

Made from the settings model by `python -m fusecache.cli.options`: change the model, not this file.

A setting is read from, later ones winning: its default, a TOML file (`--config FILE`, `-o config=FILE` or
`FUSECACHE_CONFIG`), an environment variable, an `-o` option of `fusecache mount` or mount(8). An unknown name is
an error that names the nearest valid one.

Sizes are written like `4096`, `64MiB`, `500G` (binary, like `GiB`) or `500GB` (decimal); amounts also as a share
of the disk, like `80%`; durations like `30`, `250ms`, `5m`, `1h`; modes in octal, like `0444` (in TOML `0o444`).
"""

_EXAMPLE = """\
## A configuration file

```toml
cache_dir = "/nvme/fusecache"
cache_size = "80%"
allow_other = true

[tuning]
concurrency = 32

[[source]]                      # /models/llama
name = "llama"
url = "s3://models/llama"
profile = "research"

[sources.mirror]                # /models/mirror: another way to write the same
url = "s3://mirror"
endpoint_url = "https://minio.example:9000"
access_key_id = "..."           # then chmod 600 the file
secret_access_key = "..."
```

One source without a name is the root of the mount. `fusecache mount llama /models --config FILE` mounts one
source of the file alone. Environment variables for one of several sources are written
`FUSECACHE_SOURCES__MIRROR__SECRET_ACCESS_KEY`.
"""


def make_reference() -> str:
    """The text of docs/OPTIONS.md."""
    secret = ", ".join(f"`{key}`" for key in SECRET_KEYS)
    generic = ", ".join(f"`{word}`" for word in sorted(IGNORED_OPTIONS))
    parts = [
        _INTRODUCTION,
        "## Of a mount\n\nAt the top of the file; `-o NAME=VALUE`; `FUSECACHE_NAME`.\n",
        _options_table(MountConfig, skip=("sources", "tuning", "peers", "mountpoint")),
        "## Of requests to the sources\n\nBelow `[tuning]`; `-o NAME=VALUE`; `FUSECACHE_TUNING__NAME`.\n",
        _options_table(Tuning),
        "## Of the exchange between nodes\n\nBelow `[peers]`; `-o peers.NAME=VALUE`; `FUSECACHE_PEERS__NAME`.\n",
        _options_table(PeerSettings),
        "## Of a source\n\nBelow `[[source]]` or `[sources.NAME]`; with one source also `-o NAME=VALUE` and "
        f"`FUSECACHE_NAME`. {secret} are refused with `-o`: every user can read the mount table. What is not set "
        "is found by the libraries: `AWS_*` and `GOOGLE_*` variables, their files, instance roles.\n",
        _options_table(SourceConfig),
        f"## Words of mount(8)\n\nAccepted and without effect: {generic}, and all that begin with `x-`. `rw` is "
        "refused: the file system is read-only; mount(8) itself adds it to lines without `ro`, so that is let be. "
        "`nonempty` mounts over a directory that is not empty, and hides what is in it.\n",
        _EXAMPLE,
        "## Metrics\n\nWith `metrics_port`, at `http://127.0.0.1:PORT/metrics`:\n",
        _metrics_table(),
    ]
    return "\n".join(parts)


def _options_table(model: type[BaseModel], skip: tuple[str, ...] = ()) -> str:
    lines = ["| name | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name not in skip:
            cells = (f"`{name}`", _value_kind(field), _default_text(name, field), field.description or "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _field_types(field: FieldInfo) -> Iterator[Any]:
    """The field's type, and those of a union."""
    yield field.annotation
    yield from get_args(field.annotation)


def _value_kind(field: FieldInfo) -> str:
    for hint in _field_types(field):
        if get_origin(hint) is Literal:
            return ", ".join(f"`{value}`" for value in get_args(hint))
    parsers = [item for item in field.metadata if item is not None]
    for name, alias in (
        ("amount", Amount),
        ("size", Bytes),
        ("duration", Seconds),
        ("octal mode", Mode),
        ("user", Uid),
        ("group", Gid),
    ):
        if any(parser in get_args(alias) for parser in parsers):
            return name
    for hint in _field_types(field):
        if hint is SecretStr:
            return "secret"
        if get_origin(hint) is dict:
            return "table"
        if Bytes in (hint, field.annotation):
            return "size"
    if field.annotation is not None and get_origin(field.annotation) is tuple:
        return "texts"
    plain = next(hint for hint in _field_types(field) if hint is not None)
    plain = next((item for item in get_args(plain) if item is not type(None)), plain)
    if get_args(plain):
        plain = get_args(plain)[0]
    return {bool: "true or false", int: "number", str: "text", Path: "path"}.get(plain, str(plain))


def _default_text(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    told = {
        "cache_dir": "`/var/cache/fusecache` for root, else `$XDG_CACHE_HOME/fusecache`",
        "runtime_dir": "`/run/fusecache` for root, else `$XDG_RUNTIME_DIR/fusecache`",
        "node": "this machine's name",
        "uid": "who mounts",
        "gid": "who mounts",
        "storage_options": "",
    }
    if name in told:
        return told[name]
    value = field.default
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    kind = _value_kind(field)
    if kind == "octal mode":
        return f"`{value:04o}`"
    if kind == "size":
        return f"`{format_size(value).replace(' ', '')}`"
    if kind == "duration":
        return f"`{value:g}s`" if value >= 1 else f"`{value * 1000:g}ms`"
    return f"`{value}`"


def _metrics_table() -> str:
    lines = ["| name | kind | label | meaning |", "|---|---|---|---|"]
    lines.append("| `fusecache_up` | gauge | | 1 while the daemon can tell its status. |")
    lines.append("| `fusecache_passthrough` | gauge | | 1 when the kernel reads complete files by itself. |")
    for metric in METRICS:
        label = f" `{metric.label}` " if metric.label else " "
        lines.append(f"| `{metric.name}` | {metric.kind} |{label}| {metric.meaning} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the reference to the file named on the command line, or docs/OPTIONS.md."""
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/OPTIONS.md")
    os.makedirs(file.parent, exist_ok=True)
    file.write_text(make_reference(), "utf-8")


if __name__ == "__main__":
    main()
