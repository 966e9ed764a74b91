"""A directory of this machine (file://). A version is inode, size and modification time to the nanosecond.

Symbolic links to files are followed (model hubs keep their blobs behind them), those to directories are not.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fusecache.errors import NotFoundError
from fusecache.origin.errors_from_answers import error_from_exception, truncated_error, version_changed_error
from fusecache.origin.interface import ListPage
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK_BYTES = 4 << 20


class LocalBackend:
    """See fusecache.origin.interface.Backend."""

    engine = "fsspec"

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/") or "/"
        self.identity = f"file://{self._root}"

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """See Backend: all in one page."""
        with _translated_os_errors(self.identity):
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
        """See Backend."""
        where = f"{self.identity}/{key}"
        with _translated_os_errors(where):
            found = os.stat(self._full_path(key))
        if not stat.S_ISREG(found.st_mode):
            raise NotFoundError(f"{where}: is not a regular file")
        return self._make_version(key, found)

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """See Backend: a file has none."""
        return None

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Iterator[Buffer]:
        """See Backend. What was read is given out only after a look at the file says it is the same still."""
        where = f"{self.identity}/{version.key}"
        with _translated_os_errors(where):
            descriptor = os.open(self._full_path(version.key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while length > 0:
                with _translated_os_errors(where):
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

    def refresh_credentials(self) -> None:
        """See Backend: there are no credentials."""

    def close(self) -> None:
        """See Backend: nothing is open."""

    def _full_path(self, key: str) -> str:
        return os.path.join(self._root, key)

    def _make_version(self, key: str, found: os.stat_result) -> ObjectVersion:
        tag = f"{found.st_ino:x}-{found.st_mtime_ns:x}"
        return ObjectVersion(self.identity, key, tag, found.st_size, found.st_mtime_ns)


@contextlib.contextmanager
def _translated_os_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise error_from_exception(where, error) from None
