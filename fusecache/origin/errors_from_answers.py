"""Errors of fusecache.errors, one line each, for the exceptions of libraries and the answers of servers.

This is the one place that decides which failures are temporary. No text of a server or library gets into a message, but
for error codes of a known form: it may quote a signed request.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable
from types import TracebackType

from fusecache.errors import (
    AccessDeniedError,
    FusecacheError,
    NotFoundError,
    OriginError,
    TemporaryOriginError,
    ThrottledError,
    VersionChangedError,
)

_ERROR_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,60}")
_CODE_ELEMENT = re.compile(r"<Code>([A-Za-z0-9_.]+)</Code>")
_THROTTLE_CODES = {
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
_TEMPORARY_CODES = {"RequestTimeout", "InternalError", "OperationAborted", "XAmzContentSHA256Mismatch"}
_EXPIRED_CODES = {
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestExpired",
    "ExpiredTokenException",
}
_CLOCK_SKEW_CODES = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_NO_BUCKET_CODES = {"NoSuchBucket", "BucketNotFound"}

CREDENTIALS_HINT = "check the credentials and what they may read"


class ErrorTranslator:
    """A with block that turns every exception of a library into an error of fusecache.errors.

    The block asks each of `translators` in turn, with `where` (the URL) and the exception; a translator answers None
    for an exception of a library that is not its own. `error_from_exception` translates the rest. May be entered again.
    """

    def __init__(self, where: str, *translators: Callable[[str, Exception], OriginError | None]) -> None:
        self.where = where
        self._translators = translators

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, FusecacheError):
            return
        for translate in self._translators:
            if (found := translate(self.where, error)) is not None:
                raise found from None
        raise error_from_exception(self.where, error) from None


def parse_error_code(body: bytes | str) -> str:
    """The error code in an XML answer of S3 or GCS; '' if there is none."""
    found = _CODE_ELEMENT.search(body if isinstance(body, str) else body.decode("ascii", "replace"))
    return found[1] if found else ""


def parse_retry_after(value: str | None) -> float | None:
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


def error_from_status(where: str, status: int, code: str = "", after: str | None = None) -> OriginError:
    """The error for an HTTP status and the error code in its body, if any. `where` is the URL."""
    code = code if _ERROR_CODE.fullmatch(code) and not code.isdigit() else ""
    said = f"{status} {code}".rstrip()
    if code in _NO_BUCKET_CODES:
        return NotFoundError(f"{where}: the bucket does not exist ({said}): check its name and the endpoint")
    if status in (429, 503) or code in _THROTTLE_CODES:
        return ThrottledError(f"{where}: the server asks to slow down ({said})", parse_retry_after(after))
    if status in (408, 425) or (status >= 500 and status != 501) or code in _TEMPORARY_CODES:
        return TemporaryOriginError(f"{where}: the server failed ({said})")
    if code in _CLOCK_SKEW_CODES:
        return AccessDeniedError(
            f"{where}: access denied ({said}): the clock of this machine is wrong, set it by NTP"
        )
    if code in _EXPIRED_CODES:
        return AccessDeniedError(f"{where}: access denied ({said}): the credentials have expired, renew them")
    if status in (401, 403) or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"):
        return AccessDeniedError(f"{where}: access denied ({said}): {CREDENTIALS_HINT}")
    if status in (404, 410):
        return NotFoundError(f"{where}: does not exist ({said})")
    if status in (412, 416):
        return version_changed_error(where)
    if status in (301, 302, 307, 308) or code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return OriginError(f"{where}: the server is for another region ({said}): set region or endpoint_url")
    return OriginError(f"{where}: the server refuses the request ({said}): check the URL and the endpoint")


def error_from_exception(where: str, error: BaseException) -> OriginError:
    """The error for any exception of a file system or socket."""
    if isinstance(error, OriginError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return NotFoundError(f"{where}: does not exist")
    if isinstance(error, PermissionError):
        return AccessDeniedError(f"{where}: access denied: {CREDENTIALS_HINT}")
    if isinstance(error, TimeoutError):
        return timeout_error(where)
    if isinstance(error, NotImplementedError | ValueError | TypeError | ImportError):
        return OriginError(
            f"{where}: can't be read like this ({type(error).__name__}): check the URL and options"
        )
    return connection_error(where, type(error).__name__)


def timeout_error(where: str) -> TemporaryOriginError:
    """The error for a wait that was too long."""
    return TemporaryOriginError(f"{where}: no byte came in time: check the endpoint and the network")


def connection_error(where: str, what: str) -> TemporaryOriginError:
    """The error for a connection that could not be made, or broke; `what` is the kind of failure."""
    return TemporaryOriginError(
        f"{where}: the connection failed ({what}): check the endpoint and the network"
    )


def truncated_error(where: str) -> TemporaryOriginError:
    """The error for an answer with fewer bytes than it promised."""
    return TemporaryOriginError(f"{where}: the answer ended early")


def version_changed_error(where: str) -> VersionChangedError:
    """The error for an object that has another version now."""
    return VersionChangedError(f"{where}: was replaced while it was read: open it again")
