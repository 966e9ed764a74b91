"""The parts of an origin that need no server: limiter, backoff, judging of failures, range checks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import (
    AccessDeniedError,
    CancelledReadError,
    ConfigError,
    NotFoundError,
    OriginError,
    TemporaryOriginError,
    ThrottledError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.origin.adaptive_limiter import AdaptiveLimiter
from fusecache.origin.backoff import Backoff
from fusecache.origin.errors_from_answers import (
    ErrorTranslator,
    error_from_exception,
    error_from_status,
    parse_error_code,
    parse_retry_after,
)
from fusecache.origin.factory import open_origin
from fusecache.origin.interface import never_cancelled
from fusecache.origin.s3 import normalize_etag
from fusecache.origin.stored_form import bytes_to_skip
from tests.support.servers import wait_until


def later() -> float:
    return time.monotonic() + 5


def test_the_limit_halves_once_per_round_and_grows_by_one_per_round() -> None:
    limiter = AdaptiveLimiter(16)
    with (
        limiter.hold_slot("x", later(), never_cancelled) as first,
        limiter.hold_slot("x", later(), never_cancelled) as second,
    ):
        limiter.note_throttled(first)
        limiter.note_throttled(second)  # sent before the halving: no news
        assert limiter.limit == 8
    with limiter.hold_slot("x", later(), never_cancelled) as third:
        limiter.note_throttled(third)
    assert limiter.limit == 4
    for _ in range(5):
        limiter.note_success()
    assert limiter.limit == 5
    for _ in range(1000):
        limiter.note_success()
    assert limiter.limit == 16
    for _ in range(10):
        with limiter.hold_slot("x", later(), never_cancelled) as generation:
            limiter.note_throttled(generation)
    assert limiter.limit == 4, "a request that stalls would stop all others"
    few = AdaptiveLimiter(2)
    with few.hold_slot("x", later(), never_cancelled) as generation:
        few.note_throttled(generation)
    assert few.limit == 2


def test_a_full_limiter_ends_waiting_at_the_deadline_or_cancellation() -> None:
    limiter = AdaptiveLimiter(1)
    with limiter.hold_slot("x", later(), never_cancelled):
        with (
            pytest.raises(UnavailableError, match="overloaded"),
            limiter.hold_slot("x", 0.0, never_cancelled),
        ):
            pass
        with pytest.raises(CancelledReadError), limiter.hold_slot("x", later(), lambda: True):
            pass


def test_who_waits_for_a_slot_until_the_deadline_is_told_the_last_failure() -> None:
    limiter = AdaptiveLimiter(1)
    denied, reset = AccessDeniedError("no"), TemporaryOriginError("reset")
    with limiter.hold_slot("x", later(), never_cancelled):
        with pytest.raises(AccessDeniedError) as caught, limiter.hold_slot("x", 0.0, never_cancelled, denied):
            pass
        assert caught.value is denied
        with (
            pytest.raises(UnavailableError, match="reset; tried until"),
            limiter.hold_slot("x", 0.0, never_cancelled, reset),
        ):
            pass


def test_slots_are_given_in_the_order_of_asking() -> None:
    limiter = AdaptiveLimiter(1)
    order: list[int] = []

    def use(number: int) -> None:
        with limiter.hold_slot("x", later(), never_cancelled):
            order.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(5)]
    with limiter.hold_slot("x", later(), never_cancelled):
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda n=number: len(limiter._slots._waiting_events) == n + 1, "the thread waits", 5)  # type: ignore[misc]
        with pytest.raises(UnavailableError), limiter.hold_slot("x", 0.0, never_cancelled):
            pass  # a thread that gives up leaves the queue
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4]


def test_a_freed_slot_wakes_a_waiter() -> None:
    limiter = AdaptiveLimiter(1)
    entered = threading.Event()

    def wait() -> None:
        with limiter.hold_slot("x", later(), never_cancelled):
            entered.set()

    with limiter.hold_slot("x", later(), never_cancelled):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.is_set()
    assert entered.wait(5)
    thread.join(5)


def test_retry_after_beyond_the_deadline_gives_up_at_once() -> None:
    error = ThrottledError("slow down", retry_after=60)
    with pytest.raises(UnavailableError) as caught:
        Backoff(0.001, 0.01).wait_before_retry(error, later(), never_cancelled)
    assert caught.value.__cause__ is error
    with pytest.raises(CancelledReadError):
        Backoff(1, 1).wait_before_retry(TemporaryOriginError("x"), later(), lambda: True)


def test_pauses_grow_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[float] = []

    def record(low: float, high: float) -> float:
        bounds.append(high)
        return 0.0

    monkeypatch.setattr("fusecache.origin.backoff.random.uniform", record)
    backoff = Backoff(0.1, 0.5)
    for _ in range(5):
        backoff.wait_before_retry(TemporaryOriginError("x"), later(), never_cancelled)
    backoff.reset_pauses()
    backoff.wait_before_retry(TemporaryOriginError("x"), later(), never_cancelled)
    assert bounds == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5, 0.1])


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", NotFoundError),
        (404, "NoSuchBucket", NotFoundError),
        (410, "", NotFoundError),
        (401, "", AccessDeniedError),
        (403, "InvalidAccessKeyId", AccessDeniedError),
        (400, "ExpiredToken", AccessDeniedError),
        (403, "RequestTimeTooSkewed", AccessDeniedError),
        (412, "PreconditionFailed", VersionChangedError),
        (416, "InvalidRange", VersionChangedError),
        (429, "", ThrottledError),
        (503, "SlowDown", ThrottledError),
        (400, "RequestLimitExceeded", ThrottledError),
        (400, "RequestTimeout", TemporaryOriginError),
        (408, "", TemporaryOriginError),
        (500, "InternalError", TemporaryOriginError),
        (504, "", TemporaryOriginError),
        (301, "PermanentRedirect", OriginError),
        (400, "AuthorizationHeaderMalformed", OriginError),
        (501, "", OriginError),
        (405, "", OriginError),
    ],
)
def test_statuses_are_judged_in_one_place(status: int, code: str, kind: type[OriginError]) -> None:
    error = error_from_status("s3://b/k", status, code)
    assert type(error) is kind
    assert str(error).startswith("s3://b/k: ")
    assert "\n" not in str(error)
    assert error.is_temporary == issubclass(kind, TemporaryOriginError)


def test_what_a_server_writes_does_not_get_into_a_message() -> None:
    assert "AWS4-HMAC" not in str(error_from_status("x", 403, "<AWS4-HMAC-SHA256 Credential=secret>"))
    assert "secret" not in str(error_from_exception("x", OSError("Authorization: secret")))


def test_retry_after_is_seconds_or_a_date() -> None:
    assert parse_retry_after("3") == 3
    assert parse_retry_after("-1") == 0
    assert parse_retry_after(None) is parse_retry_after("soon") is None
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_range_answers_are_checked() -> None:
    assert bytes_to_skip("x", 206, "bytes 10-19/100", 10, 100, 10) == 0
    assert bytes_to_skip("x", 206, "bytes 0-19/100", 20, 100, 10) == 10
    assert bytes_to_skip("x", 206, "bytes 10-19/*", 10, 100, 10) == 0
    assert bytes_to_skip("x", 200, "bytes 10-19/100", 10, 100, 10) == 0
    assert bytes_to_skip("x", 200, None, 100, 100, 10) == 10
    assert bytes_to_skip("x", 200, None, None, 100, 10) == 10
    with pytest.raises(VersionChangedError):
        bytes_to_skip("x", 206, "bytes 10-19/99", 10, 100, 10)
    with pytest.raises(VersionChangedError):
        bytes_to_skip("x", 200, None, 99, 100, 10)
    with pytest.raises(TemporaryOriginError):
        bytes_to_skip("x", 206, "bytes 11-20/100", 10, 100, 10)
    with pytest.raises(TemporaryOriginError):
        bytes_to_skip("x", 206, None, 10, 100, 10)


def test_etags_have_their_quotes() -> None:
    assert normalize_etag('"a"') == normalize_etag("a") == '"a"'
    assert normalize_etag(None) == normalize_etag("") == ""
    assert normalize_etag('W/"a"') == 'W/"a"'


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"url": "nosuchthing://x/y"}, "nosuchthing"),
        ({"url": "https://x/y", "engine": "obstore"}, "engine=obstore"),
        ({"url": "file://relative/path"}, "absolute path"),
        ({"url": "s3://b", "profile": "no-such-profile"}, "no-such-profile"),
        ({"url": "s3://b", "storage_options": {"client_kwargs": {"no_such": 1}}}, "S3 settings"),
        ({"url": "gs://b", "credentials_file": "/nonexistent.json"}, "credentials"),
        ({"url": "memory://x", "storage_options": {"loop": 1, "asynchronous": 3}}, ""),
    ],
)
def test_what_can_never_work_is_said_at_once(config: dict[str, object], words: str) -> None:
    if not words:
        open_origin(SourceConfig.model_validate(config), Tuning()).close()
        return
    with pytest.raises(ConfigError, match=words):
        open_origin(SourceConfig.model_validate(config), Tuning())


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("nothing", "file"):
        with pytest.raises(NotFoundError):
            list(open_origin(SourceConfig(url=f"file://{tmp_path}/{name}"), Tuning()).list_objects())
    with pytest.raises(NotFoundError):
        list(open_origin(SourceConfig(url="memory://no/such/place"), Tuning()).list_objects())


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "blob").write_bytes(b"blob")
    (tmp_path / "root" / "model").symlink_to("../blob")
    (tmp_path / "root" / "broken").symlink_to("nothing")
    (tmp_path / "root" / "loop").symlink_to(".")
    origin = open_origin(SourceConfig(url=f"file://{tmp_path}/root"), Tuning())
    (version,) = origin.list_objects()
    assert version.key == "model"
    assert b"".join(map(bytes, origin.read_range(version, 0, 4))) == b"blob"


def test_a_translator_asks_each_library_and_leaves_our_errors_alone() -> None:
    def translate_key_error(where: str, error: Exception) -> OriginError | None:
        return NotFoundError(f"{where}: no key") if isinstance(error, KeyError) else None

    errors = ErrorTranslator("x://y", translate_key_error)
    with pytest.raises(NotFoundError, match="x://y: no key"), errors:
        raise KeyError
    with pytest.raises(AccessDeniedError), errors:
        raise PermissionError
    ours = CancelledReadError("gone")
    with pytest.raises(CancelledReadError) as caught, errors:
        raise ours
    assert caught.value is ours
    with pytest.raises(KeyboardInterrupt), errors:
        raise KeyboardInterrupt
    with errors:
        pass


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"<?xml?><Error><Code>SlowDown</Code><Message>...", "SlowDown"),
        ("status 503: <Error><Code>InternalError</Code>", "InternalError"),
        (b"<Error><Code>not a code</Code>", ""),
        (b"\xff\xfe", ""),
        (b"", ""),
    ],
)
def test_the_code_in_an_error_answer_is_found(body: bytes | str, code: str) -> None:
    assert parse_error_code(body) == code
