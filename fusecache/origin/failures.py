"""From what libraries and servers say to the errors of fusecache.errors, one line each.

The one place that decides what is temporary. Nothing that a server or library wrote gets into a message but for
error codes of a known form: it may quote a signed request.
"""

from __future__ import annotations

import email.utils
import re
import time

from fusecache.errors import (
    AccessDeniedError,
    NotFoundError,
    OriginError,
    TemporaryOriginError,
    ThrottledError,
    VersionChangedError,
)

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,60}")
_THROTTLED = {
    "SlowDown",
    "SlowDownRead",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "TooManyRequestsException",
    "BandwidthLimitExceeded",
    "rateLimitExceeded",
    "userRateLimitExceeded",
}
_TEMPORARY = {"RequestTimeout", "InternalError", "OperationAborted", "XAmzContentSHA256Mismatch"}
_EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired", "ExpiredTokenException"}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_NO_BUCKET = {"NoSuchBucket", "BucketNotFound"}

CREDENTIALS_HINT = "check the credentials and what they may read"


def is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    return isinstance(error, OriginError) and error.temporary


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None if it holds neither."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def from_status(where: str, status: int, code: str = "", after: str | None = None) -> OriginError:
    """The error for an HTTP status and the error code in its body, if any. `where` is the URL."""
    code = code if _CODE.fullmatch(code) and not code.isdigit() else ""
    said = f"{status} {code}".rstrip()
    if code in _NO_BUCKET:
        return NotFoundError(f"{where}: the bucket does not exist ({said}): check its name and the endpoint")
    if status in (429, 503) or code in _THROTTLED:
        return ThrottledError(f"{where}: the server asks to slow down ({said})", retry_after(after))
    if status in (408, 425) or (status >= 500 and status != 501) or code in _TEMPORARY:
        return TemporaryOriginError(f"{where}: the server failed ({said})")
    if code in _SKEWED:
        return AccessDeniedError(
            f"{where}: access denied ({said}): the clock of this machine is wrong, set it by NTP"
        )
    if code in _EXPIRED:
        return AccessDeniedError(f"{where}: access denied ({said}): the credentials have expired, renew them")
    if status in (401, 403) or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"):
        return AccessDeniedError(f"{where}: access denied ({said}): {CREDENTIALS_HINT}")
    if status in (404, 410):
        return NotFoundError(f"{where}: does not exist ({said})")
    if status in (412, 416):
        return changed(where)
    if status in (301, 302, 307, 308) or code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return OriginError(f"{where}: the server is for another region ({said}): set region or endpoint_url")
    return OriginError(f"{where}: the server refuses the request ({said}): check the URL and the endpoint")


def from_os_error(where: str, error: BaseException) -> OriginError:
    """The error for what any file system or socket raises."""
    if isinstance(error, OriginError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return NotFoundError(f"{where}: does not exist")
    if isinstance(error, PermissionError):
        return AccessDeniedError(f"{where}: access denied: {CREDENTIALS_HINT}")
    if isinstance(error, TimeoutError):
        return timed_out(where)
    if isinstance(error, NotImplementedError | ValueError | TypeError | ImportError):
        return OriginError(
            f"{where}: can't be read like this ({type(error).__name__}): check the URL and options"
        )
    return broken(where, type(error).__name__)


def timed_out(where: str) -> TemporaryOriginError:
    """Nothing came for too long."""
    return TemporaryOriginError(f"{where}: no byte came in time: check the endpoint and the network")


def broken(where: str, what: str) -> TemporaryOriginError:
    """The connection could not be made, or broke; `what` is the kind of it."""
    return TemporaryOriginError(
        f"{where}: the connection failed ({what}): check the endpoint and the network"
    )


def truncated(where: str) -> TemporaryOriginError:
    """Fewer bytes than promised."""
    return TemporaryOriginError(f"{where}: the answer ended early")


def changed(where: str) -> VersionChangedError:
    """Another version is there now."""
    return VersionChangedError(f"{where}: was replaced while it was read: open it again")
