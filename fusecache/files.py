"""Replace a file, so that a reader and a crash find the old contents or the new ones."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file beside `path`, no other caller's, that the body makes; as the body ends, the
    temporary file takes the place of `path`. If the body raises, the temporary file is removed and `path` left alone.
    Raises OSError. Nothing is synced to the disk: a body that needs that does it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
