"""Domain exceptions. No errno here: the only domain -> errno table is mount/fusecache_mount/kernel/errnos.py.

Every message is one line that names the thing and the way out, and never holds a secret.
"""

from __future__ import annotations


class FusecacheError(Exception):
    """Base of all errors that a user may see; `str()` of it is fit to print."""


class ConfigError(FusecacheError):
    """A wrong option, file or value: names the file, line and key where there is one."""


class MountError(FusecacheError):
    """The mountpoint, the kernel or the privileges do not allow the mount."""


class OriginError(FusecacheError):
    """The object storage failed; `is_temporary` says whether the same request may succeed later."""

    is_temporary = False


class NotFoundError(OriginError):
    """The object, or the bucket, does not exist (404)."""


class AccessDeniedError(OriginError):
    """The credentials do not allow it, also after one refresh (401, 403)."""


class VersionChangedError(OriginError):
    """The object is no longer the version that was asked for (412, another ETag or generation)."""


class TemporaryOriginError(OriginError):
    """The same request may succeed later: connection reset, timeout, truncated body, 500, 502, 504."""

    is_temporary = True


class ThrottledError(TemporaryOriginError):
    """The origin asked for fewer requests (429, 503); `retry_after` is the pause it asked for, in seconds, or None."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(OriginError):
    """No answer came before the deadline, or before the origin was closed; the last temporary error is its
    `__cause__`."""


class StoreError(FusecacheError):
    """The block store can't keep or give blocks. Never an error to a reader: its bytes are fetched past the store."""


class StoreFullError(StoreError):
    """No space can be reserved, also after eviction."""


class AttestationError(FusecacheError):
    """The bytes are not those that the manifest names, or no manifest names the file (verify=manifest)."""


class CancelledReadError(FusecacheError):
    """The reader went away (interrupt, release, shutdown) before its bytes came."""


class ControlError(FusecacheError):
    """The daemon of a mount refused what the command line asked it for."""


class DaemonUnreachableError(ControlError):
    """No daemon answers for this mount, or not within the deadline."""


def first_error(error: BaseException, preferred: type[BaseException] = FusecacheError) -> BaseException:
    """The error to show for a group of them, however deep it is nested: the first one of type `preferred` if there is
    one, else the first of any type. An error that is no group is returned as it is."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    found: BaseException = error.subgroup(preferred) or error
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
