"""A body that is not the stored form of an object is never taken for it: right bytes or one clear error."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable

import pytest

from fusecache.config.model import SourceConfig
from fusecache.errors import OriginError, TemporaryOriginError, UnavailableError, VersionChangedError
from fusecache.origin.interface import Origin
from fusecache.origin.stored_form import bytes_to_skip, hold_until_end
from fusecache.types import ObjectVersion
from tests.support.answering import NOT_FOUND, Answer, AnsweringServer, Question, object_answer
from tests.support.origins import QUICK, opened, read

PLAIN = random.Random(5).randbytes(20_000) + b"A" * 400_000 + random.Random(6).randbytes(5_000)
STORED = gzip.compress(PLAIN, mtime=0)
ETAG = '"0123456789abcdef0123456789abcdef"'
HEADERS = {"ETag": ETAG, "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
ENGINES = ("auto", "obstore", "fsspec", "http")


def source(url: str, engine: str) -> SourceConfig:
    """The source of an object `a` of bucket, or folder, `b`."""
    if engine == "http":
        return SourceConfig(url=f"{url}/b")
    return SourceConfig.model_validate(
        {
            "url": "s3://b",
            "endpoint_url": url,
            "region": "us-east-1",
            "access_key_id": "k",
            "secret_access_key": "s",
            "engine": engine,
        }
    )


def version_of(origin: Origin, engine: str, size: int) -> ObjectVersion:
    return ObjectVersion(origin.identity, "a", ETAG, size, 1_767_323_045_000_000_000)


def answer_gets_with(make: Callable[[Question], Answer]) -> Callable[[Question], Answer]:
    return lambda question: make(question) if question.path == "/b/a" else NOT_FOUND


@pytest.mark.parametrize("engine", ENGINES)
def test_an_object_that_is_stored_coded_comes_as_it_is_stored(engine: str) -> None:
    coded = {**HEADERS, "Content-Encoding": "gzip"}
    with (
        AnsweringServer(answer_gets_with(lambda question: object_answer(question, STORED, coded))) as server,
        opened(source(server.url, engine)) as origin,
    ):
        version = version_of(origin, engine, len(STORED))
        assert origin.stat_object("a") == version
        assert read(origin, version) == STORED
        assert read(origin, version, 1000, 500) == STORED[1000:1500]
        assert {question.headers.get("accept-encoding") for question in server.seen} == {"identity"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tells_length", [True, False])
def test_a_body_that_the_server_coded_is_refused(engine: str, tells_length: bool) -> None:
    coded = Answer(200, STORED, {**HEADERS, "Content-Encoding": "gzip"}, tells_length)
    with (
        AnsweringServer(answer_gets_with(lambda question: coded)) as server,
        opened(source(server.url, engine)) as origin,
        pytest.raises(OriginError, match="sends it coded"),
    ):
        read(origin, version_of(origin, engine, len(PLAIN)))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_body_without_a_length_counts_only_when_it_ends_at_the_size(engine: str) -> None:
    """Served is always PLAIN, whole and without a length; the version says how long the object is."""
    unsized = Answer(200, PLAIN, HEADERS, tells_length=False)
    with (
        AnsweringServer(answer_gets_with(lambda question: unsized)) as server,
        opened(source(server.url, engine), QUICK.model_copy(update={"deadline": 0.5})) as origin,
    ):
        version = version_of(origin, engine, len(PLAIN))
        assert read(origin, version) == PLAIN
        assert read(origin, version, 19_000, 2_000) == PLAIN[19_000:21_000]
        with pytest.raises(OriginError, match="more bytes than the object has"):
            read(origin, version_of(origin, engine, len(STORED)))
        with pytest.raises(UnavailableError, match="ended early"):
            read(origin, version_of(origin, engine, len(PLAIN) + 1), 0, 100)


def transcoding_gcs(question: Question) -> Answer:
    """GCS with an object `a` that is stored with gzip: it decodes for a client that does not take gzip."""
    if question.path == "/storage/v1/b/b/o":
        item = {"name": "a", "size": str(len(STORED)), "generation": "7"}
        return Answer(body=repr({"items": [item]}).replace("'", '"').encode())
    if question.path not in ("/storage/v1/b/b/o/a", "/b/a"):
        return NOT_FOUND
    headers = {**HEADERS, "x-goog-generation": "7"}
    if "gzip" not in question.headers.get("accept-encoding", ""):
        return Answer(200, PLAIN, headers, tells_length=False)
    return object_answer(question, STORED, {**headers, "Content-Encoding": "gzip"})


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_gcs_gives_what_is_stored_and_does_not_decode_it(engine: str) -> None:
    with (
        AnsweringServer(transcoding_gcs) as server,
        opened(SourceConfig(url="gs://b", endpoint_url=server.url, engine=engine)) as origin,  # type: ignore[arg-type]
    ):
        (version,) = origin.list_objects()
        assert read(origin, version) == STORED
        assert read(origin, version, 1000, 500) == STORED[1000:1500]


def test_lengths_tell_whether_a_coded_body_is_the_stored_one() -> None:
    assert bytes_to_skip("x", 206, "bytes 10-19/100", 10, 100, 10, "gzip") == 0
    assert bytes_to_skip("x", 206, "bytes 10-19/100", None, 100, 10, "gzip") == 0
    assert bytes_to_skip("x", 200, None, 100, 100, 10, "gzip") == 10
    assert bytes_to_skip("x", 206, "bytes 10-19/*", 10, 100, 10, "Identity") == 0
    assert bytes_to_skip("x", 200, None, None, 100, 10, "aws-chunked") == 10
    for answer in (
        (206, "bytes 10-19/*", 10),
        (206, "bytes 10-19/99", 10),
        (206, "bytes 10-19/100", 7),
        (200, None, None),
        (200, None, 99),
    ):
        with pytest.raises(OriginError, match="sends it coded") as caught:
            bytes_to_skip("x", *answer, 100, 10, "gzip")
        assert not isinstance(caught.value, TemporaryOriginError | VersionChangedError)


def test_a_held_body_is_given_out_after_its_end() -> None:
    chunks = iter([b"0123", b"4567", b"89"])
    assert b"".join(map(bytes, hold_until_end("x", chunks, 10, 3, 4))) == b"3456"
    assert next(chunks, None) is None
    with pytest.raises(TemporaryOriginError):
        list(hold_until_end("x", [b"012345678"], 10, 3, 4))
    with pytest.raises(OriginError, match="more bytes"):
        list(hold_until_end("x", [b"0123456789", b"a"], 10, 3, 4))
    with pytest.raises(OriginError, match="neither range nor length"):
        list(hold_until_end("x", [], 1 << 40, 3, 4))
