"""The settings model. Its field descriptions are the option reference (docs/OPTIONS.md).

Frozen. Secrets are SecretStr: they appear in no repr, log or error, only in dump_with_secrets(), which is for an
inherited descriptor and never for argv or the environment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from fusecache.config.machine_sizes import cache_disk_size, file_system_bytes, usable_memory
from fusecache.config.peer_settings import PeerSettings
from fusecache.config.units import format_size, resolve_amount
from fusecache.config.value_types import AbsolutePath, Amount, Bytes, Gid, Mode, Seconds, SettingsModel, Uid
from fusecache.errors import ConfigError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_SECRET_WORD = re.compile(r"secret|token|password|passwd|credential|(^|_)key", re.IGNORECASE)


class SourceConfig(SettingsModel):
    """A source of objects: one bucket, prefix or fsspec URL, and the way to reach it."""

    name: str = Field(
        default="",
        description="Name of the folder below the mountpoint that shows this source. "
        "Empty: the source is the root of the mount.",
    )
    url: str = Field(
        description="`s3://bucket/prefix`, `gs://bucket/prefix`, any other fsspec URL, or an absolute path."
    )
    engine: Literal["auto", "obstore", "fsspec"] = Field(
        default="auto",
        description="Library that moves the bytes: `obstore` (S3 and GCS), the fsspec file system itself, "
        "or the fastest that can.",
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of an S3- or GCS-compatible server instead of the provider's."
    )
    region: str | None = Field(default=None, description="Region of the bucket.")
    profile: str | None = Field(default=None, description="Profile in the AWS configuration files.")
    anonymous: bool = Field(default=False, description="Send no credentials: for public buckets.")
    access_key_id: SecretStr | None = Field(default=None, description="S3 access key.")
    secret_access_key: SecretStr | None = Field(default=None, description="S3 secret key.")
    session_token: SecretStr | None = Field(default=None, description="S3 session token.")
    credentials_file: AbsolutePath | None = Field(
        default=None,
        description="GCS service account or authorized user JSON, or an AWS shared credentials file.",
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="Passed to the fsspec file system as they are."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
            raise ValueError(f"{name!r} can't be the name of a folder")
        return name

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if url.startswith("/"):
            url = "file://" + os.path.normpath(url)
        if not _SCHEME.match(url):
            raise ValueError(
                "the source is not a URL: write it like s3://bucket/prefix or gs://bucket/prefix"
            )
        parts = urlsplit(url)
        if parts.password is not None:
            raise ValueError("the URL holds a password: put credentials into the config file or environment")
        if parts.scheme in ("s3", "s3a", "gs", "gcs") and not parts.netloc:
            raise ValueError(f"the URL names no bucket: write it like {parts.scheme}://bucket/prefix")
        return url

    @field_validator("endpoint_url")
    @classmethod
    def _check_endpoint(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an address like https://host:port")
        if parts.username is not None or parts.password is not None:
            raise ValueError("holds credentials: put them into access_key_id and secret_access_key")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _check_consistency(self) -> SourceConfig:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            missing = "access_key_id" if self.access_key_id is None else "secret_access_key"
            raise ValueError(f"{missing} is missing: an access key has two parts")
        if self.anonymous and self.access_key_id is not None:
            raise ValueError("anonymous contradicts access_key_id: drop one of them")
        return self

    def secret_values(self) -> list[str]:
        """The secret values in here, for redaction."""
        found = [
            secret.get_secret_value()
            for secret in (self.access_key_id, self.secret_access_key, self.session_token)
            if secret is not None
        ]
        _collect_secrets(self.storage_options, found)
        return [value for value in found if value]


def _collect_secrets(options: Mapping[str, Any], found: list[str]) -> None:
    for key, value in options.items():
        if isinstance(value, Mapping):
            _collect_secrets(value, found)
        elif isinstance(value, str) and _SECRET_WORD.search(key):
            found.append(value)


class Tuning(SettingsModel):
    """Limits and timeouts of the requests to an origin."""

    concurrency: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Most requests in flight to one source; less while it throttles.",
    )
    range_size: Bytes = Field(
        default=16 << 20, ge=64 << 10, le=1 << 30, description="Bytes asked for by one request."
    )
    deadline: Seconds = Field(
        default=60.0, gt=0, description="A read fails with EIO when the origin did not deliver for so long."
    )
    connect_timeout: Seconds = Field(default=5.0, gt=0, description="Longest wait for a connection.")
    stall_timeout: Seconds = Field(
        default=10.0, gt=0, description="A request that brings no byte for so long is made again."
    )
    retry_initial: Seconds = Field(
        default=0.1, gt=0, description="First pause before a retry; it doubles, with jitter."
    )
    retry_max: Seconds = Field(default=5.0, gt=0, description="Longest pause before a retry.")


def default_cache_dir(env: Mapping[str, str] = os.environ) -> Path:
    """/var/cache/fusecache for root, else $XDG_CACHE_HOME/fusecache."""
    if os.geteuid() == 0:
        return Path("/var/cache/fusecache")
    home = env.get("XDG_CACHE_HOME")
    return Path(home if home and home.startswith("/") else Path.home() / ".cache") / "fusecache"


def make_default_cache_dir(cache_dir: Path, env: Mapping[str, str] = os.environ) -> None:
    """Make the parents of the default cache directory, and of no other: a missing parent of a directory that
    the user chose is most often a disk that is not mounted. Raises OSError."""
    if cache_dir == default_cache_dir(env):
        cache_dir.parent.mkdir(mode=0o755, parents=True, exist_ok=True)


def default_runtime_dir(env: Mapping[str, str] = os.environ) -> Path:
    """/run/fusecache for root, else $XDG_RUNTIME_DIR/fusecache, else /tmp/fusecache-UID."""
    if os.geteuid() == 0:
        return Path("/run/fusecache")
    runtime = env.get("XDG_RUNTIME_DIR")
    if runtime and runtime.startswith("/"):
        return Path(runtime, "fusecache")
    return Path(f"/tmp/fusecache-{os.geteuid()}")  # noqa: S108  its owner and mode are checked before use


class MountConfig(SettingsModel):
    """All settings of a mount."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    mountpoint: AbsolutePath = Field(description="Where the sources appear.")
    cache_dir: AbsolutePath = Field(
        default_factory=default_cache_dir,
        description="Directory on a local disk that keeps the blocks. Several mounts may share it. "
        "Not on overlayfs, if reads are to run at the speed of the disk.",
    )
    cache_size: Amount = Field(
        default="90%", description="Most bytes to keep there: a size, or a share of its file system."
    )
    free_space: Amount = Field(
        default="5%", description="Bytes to leave free on that file system, as a size or a share."
    )
    store: Literal["on", "off", "small"] = Field(
        default="on",
        description="Where objects are kept: `on`: in `cache_dir`; `off`: in memory, and nothing of them is written to "
        "a disk; `small`: those of more than `small_size` in memory, the others in `cache_dir`.",
    )
    small_size: Bytes = Field(
        default=64 << 20,
        description="With `store=small`: up to this size a file is kept in `cache_dir`: configs, tokenizers, indexes.",
    )
    memory_size: Amount = Field(
        default="25%",
        description="Most bytes of objects to keep in memory, unless `store=on`: a size, or a share of the memory of "
        "this machine or container. Objects that do not fit are passed on to their readers and not kept.",
    )
    memory_dir: AbsolutePath = Field(
        default=Path("/dev/shm"),  # noqa: S108  each mount makes a directory of its own there, of mode 0700
        description="A tmpfs for that. Each mount has a directory of its own there, which goes with it.",
    )
    block_size: Bytes = Field(
        default=1 << 20, ge=64 << 10, le=64 << 20, description="Unit of presence and checksums, a power of 2."
    )
    verify: Literal["start", "boot", "always", "manifest"] = Field(
        default="start",
        description="When the checksums of cached blocks are checked: once per start of the daemon, only "
        "after a reboot or unclean stop, or at every read. `manifest`: as `start`, and nobody can open a file before "
        "all of it was fetched and its sha256 is what a manifest beside it, or the origin's metadata, says.",
    )
    manifest_key: AbsolutePath | None = Field(
        default=None,
        description="With verify=manifest: file with the EC public key (PEM) that signed the `model.sig` files "
        "(OpenSSF model signing) that are to be believed. Without it every manifest is.",
    )
    tuning: Tuning = Field(default_factory=Tuning)
    peers: PeerSettings = Field(default_factory=PeerSettings)
    allow_other: bool = Field(default=False, description="Let all users of the machine read the mount.")
    uid: Uid = Field(default_factory=os.geteuid, description="Owner of all files, a number or name.")
    gid: Gid = Field(default_factory=os.getegid, description="Group of all files, a number or name.")
    umask: Mode = Field(default=0, description="Permission bits to take away, octal.")
    file_mode: Mode = Field(default=0o444, description="Permission bits of files, octal.")
    dir_mode: Mode = Field(default=0o555, description="Permission bits of directories, octal.")
    metadata_ttl: Seconds = Field(
        default=60.0, ge=0, description="How long a listing is trusted before it is made again."
    )
    negative_ttl: Seconds = Field(
        default=60.0, ge=0, description="How long the kernel remembers that a name does not exist."
    )
    passthrough: Literal["auto", "off"] = Field(
        default="auto",
        description="Whether the kernel reads complete files by itself, where it can.",
    )
    threads: int = Field(default=4, ge=1, le=64, description="Threads that answer reads.")
    read_ahead: Bytes = Field(
        default=8 << 20, le=1 << 30, description="How far the kernel reads ahead of a sequential reader."
    )
    max_background: int = Field(
        default=128, ge=1, le=65535, description="Most asynchronous requests of the kernel in flight."
    )
    prefetch: Literal["auto", "off"] = Field(
        default="auto",
        description="Whether the first read of a file fetches all of it, and then its siblings, and a read of a "
        "model's `config.json` its weights.",
    )
    open_wait: Seconds = Field(
        default=5.0,
        ge=0,
        description="Opening a file of weights that is not in the cache yet waits until it is, if that will take "
        "no longer than this: then the kernel reads it by itself, without the daemon. 0: never wait.",
    )
    learn: Literal["auto", "off"] = Field(
        default="auto",
        description="Whether the order in which a model is read is taken down at its first load, a few KiB in the "
        "cache directory and at other nodes, and followed at the next one: what that load left out is not fetched "
        "ahead.",
    )
    prefetch_budget: Bytes | None = Field(
        default=None, description="Most bytes of following shards to fetch ahead; unset: as the cache holds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severity to log."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="One line per event, as text or JSON."
    )
    log_file: AbsolutePath | None = Field(
        default=None, description="File to append the log to; unset: the runtime directory."
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Port of 127.0.0.1 that serves Prometheus /metrics; 0: none."
    )
    runtime_dir: AbsolutePath = Field(
        default_factory=default_runtime_dir,
        description="Directory of the control sockets and logs of mounts.",
    )

    @field_validator("block_size")
    @classmethod
    def _check_power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError(f"{size} is not a power of 2")
        return size

    @model_validator(mode="after")
    def _check_consistency(self) -> MountConfig:
        names = [source.name for source in self.sources]
        if len(names) > 1 and "" in names:
            raise ValueError("each of several sources needs a name: it becomes a folder of the mount")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}")
        if self.manifest_key is not None and self.verify != "manifest":
            raise ValueError("manifest_key means nothing without verify=manifest")
        if self.verify == "manifest" and self.peers.local_copies == "owned":
            raise ValueError("verify=manifest checks whole files: it needs peers.local_copies=all")
        if self.cache_size in (0, "0%"):
            raise ValueError("cache_size has to be above 0")
        if self.memory_size in (0, "0%"):
            raise ValueError("memory_size has to be above 0")
        try:
            inside = self.cache_dir.is_relative_to(self.mountpoint)
        except ValueError:
            inside = False
        if inside:
            raise ValueError(f"cache_dir {self.cache_dir} is inside the mountpoint: choose another")
        return self

    def cache_limit_bytes(self) -> int:
        """Most bytes to store in the cache directory; a share is taken of its file system now. Raises ConfigError."""
        return resolve_amount(self.cache_size, cache_disk_size(self.cache_dir))

    def min_free_bytes(self) -> int:
        """Bytes to leave free on the file system of the cache directory; a share is taken of it now. Raises
        ConfigError."""
        return resolve_amount(self.free_space, cache_disk_size(self.cache_dir))

    def memory_dir_bytes(self) -> int:
        """Bytes of the file system of memory_dir. Raises ConfigError."""
        try:
            return file_system_bytes(self.memory_dir)
        except OSError as error:
            raise ConfigError(
                f"memory_dir {self.memory_dir}: {error.strerror}: set it to a directory on a tmpfs"
            ) from error

    def memory_limit_bytes(self) -> int:
        """Most bytes to store in memory. Raises ConfigError where the tmpfs has no room for so much."""
        there = self.memory_dir_bytes()
        limit = resolve_amount(self.memory_size, usable_memory() if isinstance(self.memory_size, str) else 0)
        if limit > there:
            raise ConfigError(
                f"memory_dir {self.memory_dir} holds {format_size(there)} and memory_size is {format_size(limit)}: "
                "lower memory_size, or make the tmpfs larger (docker run --shm-size, mount -o remount,size=)"
            )
        return limit

    def weights_limit_bytes(self) -> int:
        """Most bytes to store where files of weights are kept. Raises ConfigError."""
        return self.memory_limit_bytes() if self.store in ("off", "small") else self.cache_limit_bytes()

    def block_verify_mode(self) -> Literal["start", "boot", "always"]:
        """When the store checks the checksums of cached blocks."""
        return "start" if self.verify == "manifest" else self.verify

    def secret_values(self) -> list[str]:
        """All secret values in here, for redaction."""
        return [
            *(secret for source in self.sources for secret in source.secret_values()),
            *self.peers.secret_values(),
        ]

    def dump_with_secrets(self) -> bytes:
        """JSON with all secrets, for an inherited pipe or memfd only."""
        return json.dumps(self.model_dump(mode="python"), default=_reveal_secret).encode()

    @classmethod
    def load_with_secrets(cls, data: bytes) -> MountConfig:
        """The settings that `dump_with_secrets` wrote. Raises ConfigError."""
        try:
            return cls.model_validate(json.loads(data))
        except ValueError as error:
            # The text of the error may quote its input, secrets included.
            raise ConfigError(f"the handed-over configuration is damaged ({type(error).__name__})") from None


def _reveal_secret(value: object) -> object:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value)
