"""Origins that fail: right bytes or one clear error within the deadline, with every engine."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import (
    AccessDeniedError,
    NotFoundError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.origin.interface import Origin
from fusecache.types import ObjectVersion
from tests.support.content import check, content
from tests.support.faulty import FaultyServer, everything, gets, lists
from tests.support.origins import QUICK, opened, read, s3_config
from tests.support.servers import S3Bucket, S3Server, free_port

SIZE = 3_000_000
ENGINES = ("auto", "obstore", "fsspec", "http")
_prefixes = itertools.count(1)


@dataclass
class Shaky:
    """An origin with the object `a` (version 1) behind a server that misbehaves."""

    origin: Origin
    faulty: FaultyServer
    version: ObjectVersion
    put: Callable[[str, bytes], object]
    delete: Callable[[str], object]


@pytest.fixture(params=ENGINES)
def shaky(request: pytest.FixtureRequest) -> Iterator[Shaky]:
    engine = str(request.param)
    data = content("a", 1, 0, SIZE)
    if engine == "http":
        faulty: FaultyServer = request.getfixturevalue("faulty_http")
        put, delete = faulty.objects.__setitem__, faulty.objects.pop  # type: ignore[assignment]
        config = SourceConfig(url=faulty.url + "/")
    else:
        faulty = request.getfixturevalue("faulty_s3")
        bucket: S3Bucket = request.getfixturevalue("shared_bucket")
        prefix = f"faults-{next(_prefixes)}"

        def put(key: str, data: bytes) -> object:
            return bucket.put(f"{prefix}/{key}", data)

        def delete(key: str) -> object:
            return bucket.delete(f"{prefix}/{key}")

        config = s3_config(bucket, prefix, engine=engine, endpoint_url=faulty.url)
    put("a", data)
    with opened(config) as origin:
        version = origin.stat_object("a")
        faulty.reset_counts()
        yield Shaky(origin, faulty, version, put, delete)


def collect(shaky: Shaky, got: bytearray) -> None:
    for chunk in shaky.origin.read_range(shaky.version, 0, SIZE):
        got += chunk


def test_twenty_times_503_is_survived_and_slows_down(shaky: Shaky) -> None:
    most = shaky.origin.stats.concurrency
    shaky.faulty.add("status", status=503, times=20)
    check(read(shaky.origin, shaky.version), "a", 1)
    assert shaky.origin.stats.throttled == 20
    assert shaky.origin.stats.retries == 20
    assert shaky.origin.stats.concurrency < most
    assert shaky.faulty.count("RANGE") == 21


def test_a_failing_server_is_asked_again(shaky: Shaky) -> None:
    for status in (429, 500, 502, 504, 408):
        shaky.faulty.add("status", status=status)
    check(read(shaky.origin, shaky.version), "a", 1)
    assert shaky.origin.stats.errors == 5
    assert shaky.origin.stats.throttled == 1


@pytest.mark.parametrize("kind", ["stall", "truncate", "reset"])
@pytest.mark.parametrize("after", [None, 2_500_000])
def test_a_broken_answer_is_resumed(shaky: Shaky, kind: Any, after: int | None) -> None:
    shaky.faulty.add(kind, after=after)
    data = read(shaky.origin, shaky.version)
    assert len(data) == SIZE
    check(data, "a", 1)
    # One answer broke; a client may silently repeat a request whose connection brought not one byte.
    assert shaky.origin.stats.errors + int(after is None) >= 1
    starts = [int(request.headers["range"][6:].partition("-")[0]) for request in shaky.faulty.seen]
    if after and kind != "reset":  # a reset may overtake what was sent before it
        assert starts[0] == 0
        assert starts[-1] >= 1 << 20, "what came whole is not asked for again"


def test_one_broken_answer_after_another(shaky: Shaky) -> None:
    for kind, after in itertools.product(("reset", "truncate"), (300_000, 1_200_000, None)):
        shaky.faulty.add(kind, after=after)  # type: ignore[arg-type]
    check(read(shaky.origin, shaky.version), "a", 1)


@pytest.mark.parametrize("kind", ["whole", "ok_range"])
def test_a_200_for_a_range_is_understood(shaky: Shaky, kind: Any) -> None:
    shaky.faulty.add(kind, times=math.inf, match=gets)
    for offset, length in ((0, SIZE), (1_234_567, 99_999), (SIZE - 1, 1)):
        data = read(shaky.origin, shaky.version, offset, length)
        assert len(data) == length
        check(data, "a", 1, offset)


def test_bytes_of_another_place_are_not_taken(shaky: Shaky) -> None:
    shaky.faulty.add("shift", times=2)
    check(read(shaky.origin, shaky.version, 500, 1000), "a", 1, 500)


def test_a_server_that_ignores_the_condition_is_not_trusted(shaky: Shaky) -> None:
    shaky.faulty.add("etag")
    with pytest.raises(VersionChangedError):
        read(shaky.origin, shaky.version)


def test_an_object_that_changes_in_the_middle(shaky: Shaky) -> None:
    shaky.faulty.add("truncate", after=2_000_000)
    shaky.faulty.before(lambda: shaky.put("a", content("a", 2, 0, SIZE)), nth=2)
    got = bytearray()
    with pytest.raises(VersionChangedError):
        collect(shaky, got)
    assert got
    check(got, "a", 1)


def test_an_object_that_is_deleted_in_the_middle(shaky: Shaky) -> None:
    shaky.faulty.add("truncate", after=2_000_000)
    shaky.faulty.before(lambda: shaky.delete("a"), nth=2)
    got = bytearray()
    with pytest.raises((NotFoundError, VersionChangedError)):
        collect(shaky, got)
    check(got, "a", 1)
    with pytest.raises(NotFoundError):
        shaky.origin.stat_object("a")


def test_an_outage_ends_at_the_deadline(shaky: Shaky) -> None:
    shaky.faulty.outage()
    with pytest.raises(UnavailableError, match="tried until the deadline") as caught:
        read(shaky.origin, shaky.version, deadline=time.monotonic() + 0.3)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    shaky.faulty.clear()
    check(read(shaky.origin, shaky.version), "a", 1)


def test_a_server_that_never_answers_ends_at_the_deadline(shaky: Shaky) -> None:
    shaky.faulty.add("stall", times=math.inf, match=everything)
    with pytest.raises(UnavailableError):
        read(shaky.origin, shaky.version, deadline=time.monotonic() + 0.6)


def test_a_refusal_is_asked_again_once(shaky: Shaky) -> None:
    shaky.faulty.add("status", status=403)
    check(read(shaky.origin, shaky.version), "a", 1)
    shaky.faulty.reset_counts()
    shaky.faulty.add("status", status=403, times=math.inf)
    with pytest.raises(AccessDeniedError, match="access denied"):
        read(shaky.origin, shaky.version)
    assert shaky.faulty.count("RANGE") == 2


def test_a_stopped_listing_goes_on_at_its_page(
    s3_server: S3Server, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusecache.origin.s3.PAGE_KEYS", 2)
    bucket = s3_server.bucket()
    for number in range(7):
        bucket.put(f"p/{number}", b"x" * number)
    with opened(s3_config(bucket, "p", endpoint_url=faulty_s3.url)) as origin:
        whole = list(origin.list_objects())
        assert [version.key for version in whole] == [str(number) for number in range(7)]
        assert origin.stats.lists == faulty_s3.count("LIST") == 4
        faulty_s3.add("status", status=503, match=lists)
        faulty_s3.add("status", status=500, match=lists)
        assert list(origin.list_objects()) == whole
        assert origin.stats.lists == 4 + 4 + 2


@pytest.mark.parametrize("engine", ["auto", "obstore", "fsspec"])
def test_a_missing_bucket_is_said_to_be_missing(s3_server: S3Server, engine: str) -> None:
    bucket = S3Bucket(s3_server, "no-such-bucket", None)
    with opened(s3_config(bucket, engine=engine)) as origin:
        with pytest.raises(NotFoundError, match="bucket does not exist"):
            list(origin.list_objects())
        version = ObjectVersion(origin.identity, "a", '"x"', 10, 0)
        with pytest.raises(NotFoundError):
            read(origin, version)


@pytest.mark.parametrize("engine", ["auto", "obstore", "fsspec"])
def test_wrong_credentials_are_an_error_that_keeps_them_secret(
    s3_server: S3Server, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="fusecache")
    bucket = s3_server.bucket()
    bucket.put("a", b"hello")
    secret, token = "very-secret-thing-4711", "token-that-is-secret-0815"
    for key, secret_key in (("nobody", secret), (s3_server.access_key, secret)):
        config = s3_config(
            bucket, engine=engine, access_key_id=key, secret_access_key=secret_key, session_token=token
        )
        with opened(config) as origin:
            version = ObjectVersion(origin.identity, "a", '"x"', 5, 0)
            for attempt in (
                lambda origin=origin: list(origin.list_objects()),
                lambda origin=origin: origin.stat_object("a"),
                lambda origin=origin, version=version: read(origin, version),
            ):
                with pytest.raises(AccessDeniedError, match="check the credentials") as caught:
                    attempt()
                chain: BaseException | None = caught.value
                while chain is not None:
                    assert secret not in f"{chain!s} {chain!r}"
                    assert token not in f"{chain!s} {chain!r}"
                    chain = chain.__cause__ or chain.__context__
    assert secret not in caplog.text
    assert token not in caplog.text


@pytest.mark.parametrize("engine", ["auto", "obstore", "fsspec"])
def test_an_endpoint_where_nobody_listens(s3_server: S3Server, engine: str) -> None:
    config = s3_config(
        S3Bucket(s3_server, "b", None), engine=engine, endpoint_url=f"http://127.0.0.1:{free_port()}"
    )
    tuning = Tuning.model_validate({**QUICK.model_dump(), "deadline": 0.3})
    with opened(config, tuning) as origin:
        with pytest.raises(UnavailableError, match="check the endpoint"):
            list(origin.list_objects())
        with pytest.raises(UnavailableError, match="check the endpoint"):
            origin.stat_object("a")
        with pytest.raises(UnavailableError, match="check the endpoint"):
            read(origin, ObjectVersion(origin.identity, "a", '"x"', 5, 0))
