"""Listings that come page by page: all keys, or an error in bounded time; never a part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from xml.sax.saxutils import escape

import pytest

from fusecache.config.model import SourceConfig
from fusecache.errors import OriginError
from fusecache.origin.interface import ListPage
from fusecache.origin.listing_progress import ListingProgress
from fusecache.types import ObjectVersion
from tests.support.answering import Answer, AnsweringServer, Question
from tests.support.origins import opened

KEYS = [f"dir/{number:03} &+%.bin" for number in range(25)]
PAGE = 10


def page_answer(keys: list[str], is_truncated: bool, token: str = "") -> Answer:
    """A page as S3 writes it; `token` is an element of its own, or nothing."""
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
        f'<ETag>"1"</ETag><Size>3</Size></Contents>'
        for key in keys
    )
    return Answer(
        body=(
            "<?xml version='1.0'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
            f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{token}{contents}</ListBucketResult>"
        ).encode(),
        headers={"Content-Type": "application/xml"},
    )


def list_keys(answer: Callable[[Question], Answer]) -> tuple[list[str], int]:
    """The keys that an origin lists, and the number of requests."""
    with AnsweringServer(answer) as server:
        config = SourceConfig(url="s3://b", endpoint_url=server.url, region="us-east-1", anonymous=True)
        with opened(config) as origin:
            return [version.key for version in origin.list_objects()], len(server.seen)


@pytest.mark.parametrize("names_marker", [True, False])
def test_a_server_of_version_1_is_asked_by_markers(names_marker: bool) -> None:
    """It knows no `list-type` and no continuation token."""

    def answer(question: Question) -> Answer:
        rest = [key for key in KEYS if key > question.query.get("marker", "")]
        page = rest[:PAGE]
        marker = f"<NextMarker>{escape(page[-1])}</NextMarker>" if names_marker else ""
        return page_answer(page, len(rest) > PAGE, marker)

    assert list_keys(answer) == (KEYS, 3)


def test_a_page_cut_short_with_nothing_to_go_on_from_is_an_error() -> None:
    with pytest.raises(OriginError, match="cuts its listing short"):
        list_keys(lambda _question: page_answer([], True))


@pytest.mark.parametrize("token", ["", "<NextContinuationToken>t</NextContinuationToken>"])
def test_a_server_that_always_gives_the_first_page_is_an_error(token: str) -> None:
    with pytest.raises(OriginError, match="does not end"):
        list_keys(lambda _question: page_answer(KEYS[:PAGE], True, token))


def test_the_first_page_again_under_fresh_tokens_is_an_error() -> None:
    numbers = itertools.count()

    def answer(_question: Question) -> Answer:
        token = f"<NextContinuationToken>t{next(numbers)}</NextContinuationToken>"
        return page_answer(KEYS[:PAGE], True, token)

    with pytest.raises(OriginError, match="does not end"):
        list_keys(answer)
    assert next(numbers) == 2


def versions(keys: list[str]) -> list[ObjectVersion]:
    return [ObjectVersion("x", key, "", 1, 0) for key in keys]


def count_pages(pages: Iterator[ListPage]) -> int:
    progress = ListingProgress("x")
    for number, page in enumerate(pages, 1):
        try:
            progress.check_page(page)
        except OriginError:
            return number
    return -1


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("lead", [0, 1, 13])
def test_circles_are_found(length: int, lead: int) -> None:
    """After `lead` pages the server goes round `length` pages for ever; by keys, and by tokens of empty pages."""
    circle = itertools.chain(range(lead), itertools.cycle(range(lead, lead + length)))
    names, more_names = itertools.tee(circle)
    tokens = itertools.count()
    bound = 4 * (lead + length) + 2
    by_keys = (ListPage(versions([f"{name}"]), f"{next(tokens)}") for name in names)
    assert 0 < count_pages(by_keys) <= bound
    assert 0 < count_pages(ListPage([], f"{name}") for name in more_names) <= bound


def test_empty_pages_without_end_are_found() -> None:
    assert 0 < count_pages(ListPage([], f"{number}") for number in itertools.count()) < 2000


def test_a_long_listing_with_empty_pages_in_it_is_fine() -> None:
    pages = (
        ListPage(versions([f"{number}"]) if number % 3 else [], None if number == 9999 else f"t{number}")
        for number in range(10_000)
    )
    assert count_pages(pages) == -1
