"""Index pages of HTTP servers: their files are listed, their other links are not, and one bad entry hides no other."""

from __future__ import annotations

import logging

import pytest

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import AccessDeniedError, OriginError
from fusecache.origin.factory import open_origin
from fusecache.origin.http_index import find_keys_below
from tests.support.answering import NOT_FOUND, Answer, AnsweringServer, Question, object_answer
from tests.support.origins import QUICK

PAGE = "http://h:1/pub/m/"

APACHE = """<html><head><title>Index of /pub/m</title></head><body><table>
<tr><th><a href="?C=N;O=D">Name</a></th><th><a href="?C=M;O=A">Last modified</a></th></tr>
<tr><td><a href="/pub/">Parent Directory</a></td></tr>
<tr><td><a href="a%20b+c.json">a b+c.json</a></td></tr>
<tr><td><a href="model.bin">model.bin</a></td></tr>
<tr><td><a href="sub/">sub/</a></td></tr></table></body></html>"""
NGINX = """<a href="../">../</a>
<a href="a%20b+c.json">a b+c.json</a>   02-Jan-2026 03:04  1000
<a href="model.bin">model.bin</a>
<a href="sub/">sub/</a>"""
CADDY = """<a href="../"><span class="goup">..</span></a><A HREF='./?sort=name&amp;order=asc'>Name</A>
<a href="./a%20b+c.json">x</a><a class=x href="./model.bin">x</a><a href="./sub/">x</a><a name="top">no target</a>"""
ABSOLUTE = """<a href="/pub/m/a%20b+c.json">x</a><a href="http://h:1/pub/m/model.bin#part">x</a>
<a href="http://other/pub/m/z">x</a><a href="/pub/mm/z">x</a><a href="mailto:x@y">x</a><a href="http://[bad">x</a>
<a href="javascript:x()">x</a><a href="../m/sub/">x</a><a href=".">x</a><a href="">x</a>"""


@pytest.mark.parametrize("html", [APACHE, NGINX, CADDY, ABSOLUTE])
def test_links_to_places_below_the_page_are_keys(html: str) -> None:
    assert find_keys_below(PAGE, html, PAGE) == ["a b+c.json", "model.bin", "sub/"]
    assert find_keys_below(PAGE, html, "http://h:1/pub/")[1] == "m/model.bin"


def site(question: Question) -> Answer:
    """A folder with a file, a dangling link, an unreadable file, an unreadable folder, and a link to itself."""
    pages = {
        "/m/": '<a href="?C=N">N</a><a href="/">up</a><a href="ok.bin">x</a><a href="gone.bin">x</a>'
        '<a href="secret.bin">x</a><a href="sub/">x</a><a href="closed/">x</a><a href="sized.bin">x</a>',
        "/m/sub/": '<a href="../">up</a><a href="/m/sub/x">x</a><a href="/m/sub/">again</a>',
    }
    if question.path in pages:
        return Answer(200, pages[question.path].encode(), {"Content-Type": "text/html; charset=utf-8"})
    if question.path in ("/m/secret.bin", "/m/closed/"):
        return Answer(403)
    if question.path == "/m/sized.bin":
        return Answer(200, b"no length", tells_length=False)
    if question.path in ("/m/ok.bin", "/m/sub/x"):
        return object_answer(question, b"hello", {"ETag": '"1"'})
    return NOT_FOUND


def test_a_bad_entry_hides_no_other_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with AnsweringServer(site) as server, caplog.at_level(logging.WARNING):
        origin = open_origin(SourceConfig(url=f"{server.url}/m"), QUICK)
        for _ in range(2):
            assert sorted(version.key for version in origin.list_objects()) == ["ok.bin", "sub/x"]
        origin.close()
    (record,) = caplog.records
    assert "4 links of its index pages are left out, like this one" in record.getMessage()
    assert "closed/: access denied" in record.getMessage()


def test_a_listing_of_which_nothing_can_be_read_is_an_error() -> None:
    def answer(question: Question) -> Answer:
        page = b'<a href="a">x</a><a href="b">x</a>'
        return Answer(200, page, {"Content-Type": "text/html"}) if question.path == "/m/" else Answer(403)

    with AnsweringServer(answer) as server:
        origin = open_origin(SourceConfig(url=f"{server.url}/m"), QUICK)
        with pytest.raises(AccessDeniedError):
            list(origin.list_objects())
        origin.close()


def test_a_server_that_fails_for_one_entry_gives_no_part_of_the_listing() -> None:
    def answer(question: Question) -> Answer:
        return Answer(500) if question.path == "/m/gone.bin" else site(question)

    with AnsweringServer(answer) as server:
        origin = open_origin(SourceConfig(url=f"{server.url}/m"), Tuning(deadline=0.3, retry_max=0.1))
        with pytest.raises(OriginError, match="the server failed"):
            list(origin.list_objects())
        origin.close()
