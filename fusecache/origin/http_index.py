"""The links of an index page that lead to files and folders below it.

Index pages of Apache, nginx, Caddy or rclone also link to the folder above and to themselves in another order, and may
link anywhere.
"""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit


def find_keys_below(page_url: str, html: str, root_url: str) -> list[str]:
    """The keys, relative to `root_url`, of the links in a page that lead to places below the page, in its order, each
    once; the key of a folder ends with a slash.

    `page_url` and `root_url` end with a slash. A link with a query is not a file: it sorts or filters the page.
    """
    parser = _LinkParser()
    parser.feed(html)
    parser.close()
    page, root = urlsplit(page_url), urlsplit(root_url)
    page_path, root_path = unquote(page.path), unquote(root.path)
    keys: dict[str, None] = {}
    for href in parser.hrefs:
        try:
            target = urlsplit(urljoin(page_url, href.strip()))
        except ValueError:
            continue
        path = unquote(target.path)
        if (
            target.scheme in ("http", "https")
            and target.netloc == page.netloc
            and not target.query
            and path.startswith(page_path)
            and len(path) > len(page_path)
            and "//" not in path[len(page_path) - 1 :]
        ):
            keys[path[len(root_path) :]] = None
    return list(keys)


class _LinkParser(HTMLParser):
    """Collects the targets of all links."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of the target of an <a>."""
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]
