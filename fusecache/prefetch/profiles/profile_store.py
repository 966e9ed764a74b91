"""Access profiles of models in the cache directory: small, few, and not subject to eviction.

    <cache>/orders/<model id>.order

A file holds a packed profile (access_profile.py), which is only bytes here. Files are replaced whole; the ones that
were not used for the longest time are removed when there are too many. A directory that can't be read or written is
done without: no read depends on a profile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path

from fusecache.files import replace_file
from fusecache.prefetch.profiles.access_profile import MAX_BYTES

_log = logging.getLogger(__name__)

MAX_PROFILES = 1024
_NAME = re.compile(r"[0-9a-f]{32}")


class ProfileStore:
    """Keeps profiles by the ids of models. Thread-safe; several processes may share the directory. All methods block on
    the disk, and raise nothing."""

    def __init__(self, cache_dir: Path) -> None:
        self._directory = cache_dir / "orders"
        self._has_warned = False

    def load_profile(self, name: str) -> bytes | None:
        """The bytes that were saved under this name; None: none were, or they can't be read."""
        path = self._path(name)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_once(error)
            return None
        return data if len(data) <= MAX_BYTES else None

    def save_profile(self, name: str, data: bytes) -> None:
        """Keep these bytes under this name, instead of those that were there; too many bytes are not kept."""
        path = self._path(name)
        if path is None or len(data) > MAX_BYTES:
            return
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with replace_file(path) as temporary:
                temporary.write_bytes(data)
            self._remove_oldest_profiles()
        except OSError as error:
            self._warn_once(error)

    def profile_count(self) -> int:
        """How many profiles there are."""
        try:
            return sum(_NAME.fullmatch(Path(name).stem) is not None for name in os.listdir(self._directory))
        except OSError:
            return 0

    def _path(self, name: str) -> Path | None:
        return self._directory / f"{name}.order" if _NAME.fullmatch(name) else None

    def _remove_oldest_profiles(self) -> None:
        names = os.listdir(self._directory)
        if len(names) <= MAX_PROFILES:
            return
        used = []
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                used.append(((self._directory / name).stat().st_mtime, name))
        for _, name in sorted(used)[: len(used) - MAX_PROFILES]:
            (self._directory / name).unlink(missing_ok=True)

    def _warn_once(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("access profiles are not kept in %s: %s", self._directory, error.strerror or error)
