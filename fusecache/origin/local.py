"""A directory of this machine (file://). A version is inode, size and modification time to the nanosecond.

Symbolic links to files are followed (model hubs keep their blobs behind them), those to directories are not.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from fusecache.errors import NotFoundError
from fusecache.origin.errors_from_answers import ErrorTranslator, truncated_error, version_changed_error
from fusecache.origin.interface import ListPage, OriginBackend
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK_BYTES = 4 << 20


class LocalBackend(OriginBackend):
    """The regular files below one directory; it has no credentials and keeps nothing open."""

    engine = "fsspec"

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/") or "/"
        self.identity = f"file://{self._root}"

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """All files in one page."""
        with ErrorTranslator(self.identity):
            if not stat.S_ISDIR(os.stat(self._root).st_mode):
                raise NotFoundError(f"{self.identity}: is not a directory: give the directory of the file")
            return ListPage(list(self._walk_directory(self._root, "")))

    def _walk_directory(self, directory: str, prefix: str) -> Iterator[ObjectVersion]:
        below = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry)
                    continue
                with contextlib.suppress(OSError):  # it is gone by now, or a broken link
                    found = entry.stat()
                    if stat.S_ISREG(found.st_mode):
                        yield self._make_version(prefix + entry.name, found)
        for entry in below:
            with contextlib.suppress(FileNotFoundError):
                yield from self._walk_directory(entry.path, f"{prefix}{entry.name}/")

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """Call stat(2) on the file."""
        where = self.object_url(key)
        with ErrorTranslator(where):
            found = os.stat(self._full_path(key))
        if not stat.S_ISREG(found.st_mode):
            raise NotFoundError(f"{where}: is not a regular file")
        return self._make_version(key, found)

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Generator[Buffer, None, None]:
        """Read pieces of 4 MiB; each is given out after fstat(2) says that the file is still this version."""
        where = self.object_url(version.key)
        with ErrorTranslator(where):
            descriptor = os.open(self._full_path(version.key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while length > 0:
                with ErrorTranslator(where):
                    data = os.pread(descriptor, min(length, _CHUNK_BYTES), offset)
                    same = self._make_version(version.key, os.fstat(descriptor))
                if same != version:
                    raise version_changed_error(where)
                if not data:
                    raise truncated_error(where)
                offset += len(data)
                length -= len(data)
                yield data
        finally:
            os.close(descriptor)

    def _full_path(self, key: str) -> str:
        return os.path.join(self._root, key)

    def _make_version(self, key: str, found: os.stat_result) -> ObjectVersion:
        tag = f"{found.st_ino:x}-{found.st_mtime_ns:x}"
        return ObjectVersion(self.identity, key, tag, found.st_size, found.st_mtime_ns)
