"""The only table from domain errors to errno. The standard library and the domain errors only.

Nothing that may pass by itself is reported as an answer about the file: an outage is EIO, never ENOENT.
"""

from __future__ import annotations

import errno

from fusecache.errors import (
    AccessDeniedError,
    AttestationError,
    CancelledReadError,
    FusecacheError,
    NotFoundError,
    OriginError,
    StoreError,
    VersionChangedError,
)


class WrongNodeidError(FusecacheError):
    """An open came to the one nodeid of a file when the other one is right by now. Never leaves the mount: the open is
    answered ESTALE, and the VFS looks the path up again."""


_ERRNO_TABLE: tuple[tuple[type[BaseException], int], ...] = (
    (NotFoundError, errno.ENOENT),
    (AccessDeniedError, errno.EACCES),
    (VersionChangedError, errno.ESTALE),
    (WrongNodeidError, errno.ESTALE),
    (AttestationError, errno.EBADMSG),
    (OriginError, errno.EIO),
    (CancelledReadError, errno.EINTR),
    (StoreError, errno.EIO),
)


def errno_of(error: BaseException) -> int:
    """The errno that a system call fails with because of `error`; EIO for an error that is not in the table."""
    return next((number for kind, number in _ERRNO_TABLE if isinstance(error, kind)), errno.EIO)
