"""Any other fsspec file system (memory://, hf://, sftp://, ...): find, info and cat_file, as they are.

A version is the tag that the file system gives (ETag, checksum, revision), else a time, and the size. There are no
conditional reads here: each piece is given out only after the file system says that the version is the same still.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import fsspec
import fsspec.asyn

from fusecache.config.model import SourceConfig
from fusecache.errors import ConfigError, NotFoundError, OriginError
from fusecache.origin.aiohttp_bodies import translate_aiohttp_error
from fusecache.origin.errors_from_answers import ErrorTranslator, truncated_error, version_changed_error
from fusecache.origin.interface import ListPage, OriginBackend, parse_metadata_sha256
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK_BYTES = 4 << 20
_TAG_FIELDS = (
    "ETag",
    "etag",
    "e_tag",
    "generation",
    "xet_hash",
    "blob_id",
    "sha256",
    "sha",
    "md5Hash",
    "md5",
    "checksum",
)
_TIME_FIELDS = (
    "mtime",
    "modified",
    "LastModified",
    "last_modified",
    "updated",
    "last_commit",
    "created",
    "timeCreated",
)


class AnyFsspecBackend(OriginBackend):
    """A directory of a file system that fsspec has an implementation of."""

    engine = "fsspec"

    def __init__(self, config: SourceConfig) -> None:
        """Raises ConfigError for a scheme without an installed file system, or options that it does not take."""
        scheme = config.url.partition("://")[0]
        self.identity = identity_from_url(config.url)
        options = dict(config.storage_options)
        if config.endpoint_url:
            options.setdefault("endpoint_url", config.endpoint_url)
        try:
            made = fsspec.get_filesystem_class(scheme)
            # Other users of fsspec in this process share its cached instances, and would share a refresh.
            self._fs = made(skip_instance_cache=True, use_listings_cache=False, **options)
            self._root = str(made._strip_protocol(config.url)).rstrip("/")
        except ImportError as error:
            missing = getattr(error, "name", None) or str(error)
            raise ConfigError(f"{self.identity}: {scheme}:// needs a package: {missing}") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.identity}: {scheme}:// can't be opened ({type(error).__name__}): check storage_options"
            ) from None

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """All objects in one page."""
        self._fs.invalidate_cache()
        with ErrorTranslator(self.identity, translate_aiohttp_error):
            found = self._call_filesystem("find", self._root, detail=True, withdirs=False)
            if not found and not self._root_exists():
                raise NotFoundError(f"{self.identity}: does not exist: check the URL")
        objects = []
        for path, info in found.items():
            name = str(path)
            if info.get("type", "file") != "file" or not name.startswith(self._root):
                continue
            objects.append(self._make_version(name[len(self._root) :].lstrip("/"), info))
        return ListPage(objects)

    def _root_exists(self) -> bool:
        try:
            return bool(self._call_filesystem("exists", self._root)) or self._root in ("", "/")
        except FileNotFoundError:
            return False

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """Ask the file system for `info` of the file, past its cache."""
        where = self.object_url(key)
        with ErrorTranslator(where, translate_aiohttp_error):
            self._fs.invalidate_cache()
            info = self._call_filesystem("info", self._full_path(key), timeout=timeout)
        if info.get("type", "file") != "file":
            raise NotFoundError(f"{where}: is not a file")
        return self._make_version(key, info)

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """The sha256 that the file system tells, as hf:// does of files in LFS."""
        where = self.object_url(version.key)
        with ErrorTranslator(where, translate_aiohttp_error):
            self._fs.invalidate_cache()
            info = self._call_filesystem("info", self._full_path(version.key), timeout=timeout)
        if self._make_version(version.key, info) != version:
            raise version_changed_error(where)
        lfs = info.get("lfs")
        return parse_metadata_sha256(info.get("sha256")) or parse_metadata_sha256(
            lfs.get("sha256") if isinstance(lfs, Mapping) else None
        )

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Generator[Buffer, None, None]:
        """Ask for pieces of 4 MiB; each is given out after a look at the file's version."""
        where = self.object_url(version.key)
        while length > 0:
            size = min(length, _CHUNK_BYTES)
            with ErrorTranslator(where, translate_aiohttp_error):
                data = self._call_filesystem(
                    "cat_file", self._full_path(version.key), start=offset, end=offset + size, timeout=timeout
                )
            if self.stat_object(version.key, timeout) != version:
                raise version_changed_error(where)
            if not data:
                raise truncated_error(where)
            if len(data) > size:
                raise OriginError(
                    f"{where}: the file system gives more bytes than it was asked for, and not the file as it is stored"
                )
            offset += len(data)
            length -= len(data)
            yield data

    def _call_filesystem(self, name: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        method = getattr(self._fs, name)
        if timeout is not None and isinstance(self._fs, fsspec.asyn.AsyncFileSystem):
            coroutine = getattr(self._fs, f"_{name}", None)
            if coroutine is not None and inspect.iscoroutinefunction(coroutine):
                return fsspec.asyn.sync(self._fs.loop, coroutine, *args, timeout=timeout, **kwargs)
        return method(*args, **kwargs)

    def _full_path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _make_version(self, key: str, info: Mapping[str, Any]) -> ObjectVersion:
        size = info.get("size")
        if size is None:
            raise OriginError(
                f"{self.object_url(key)}: its size is unknown: this file system can't be mounted"
            )
        time = next((info[name] for name in _TIME_FIELDS if info.get(name)), None)
        tag = next((str(info[name]) for name in _TAG_FIELDS if info.get(name)), "")
        lfs = info.get("lfs")
        if not tag and isinstance(lfs, Mapping):
            tag = str(lfs.get("sha256", ""))
        mtime = _to_nanoseconds(time)
        return ObjectVersion(self.identity, key, tag or (f"t{mtime}" if mtime else ""), int(size), mtime)


def identity_from_url(url: str) -> str:
    """The URL without user, password, query and fragment."""
    scheme, _, rest = url.partition("://")
    rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def _to_nanoseconds(time: Any) -> int:
    if isinstance(time, datetime):
        aware = time if time.tzinfo else time.replace(tzinfo=UTC)
        return round(aware.timestamp() * 1_000_000) * 1000
    if isinstance(time, int | float):
        return round(time * 1_000_000) * 1000  # as fine as a float and a datetime are
    if isinstance(time, str):
        try:
            return _to_nanoseconds(datetime.fromisoformat(time))
        except ValueError:
            return 0
    date = getattr(time, "date", None)
    return _to_nanoseconds(date) if isinstance(date, datetime) else 0
