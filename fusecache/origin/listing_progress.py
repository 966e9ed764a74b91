"""Finds listings that never end, because the server gives the same pages again."""

from __future__ import annotations

from fusecache.errors import OriginError
from fusecache.origin.interface import ListPage

_MAX_EMPTY_PAGES = 1000
"""Pages without a key, one after the other, that a listing may have: a server may look through many deleted keys."""


class ListingProgress:
    """Looks at each page of one listing, in order. Keeps two pages' names, however long the listing: after pages 1, 2,
    4, 8, ... it remembers the page, and a listing that goes in circles comes by it again (Brent's algorithm).

    A listing has no key twice, so that two pages that begin with the same key are the same page.
    """

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._page_count = 0
        self._empty_page_count = 0
        self._remember_at = 1
        self._remembered_key: str | None = None
        self._remembered_token: str | None = None

    def check_page(self, page: ListPage) -> None:
        """Take note of the next page. Raises OriginError when it came before, or when too many pages were empty."""
        self._page_count += 1
        key = page.objects[0].key if page.objects else None
        self._empty_page_count = 0 if page.objects else self._empty_page_count + 1
        token = page.next_token
        if (
            (key is not None and key == self._remembered_key)
            or (token is not None and token == self._remembered_token)
            or (token is not None and self._empty_page_count > _MAX_EMPTY_PAGES)
        ):
            raise OriginError(
                f"{self._identity}: the listing does not end: the server gives the same page again: "
                "its files can't all be listed"
            )
        if self._page_count == self._remember_at:
            self._remember_at *= 2
            self._remembered_key, self._remembered_token = key, token
