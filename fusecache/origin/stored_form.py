"""The stored form of an object: the bytes that the origin counts in the object's size.

An answer may hold other bytes: a server may send the object coded (Content-Encoding), or decode what was stored coded.
Requests ask for the stored form, no client decodes, and the checks here refuse a body that is not it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING

from fusecache.errors import OriginError, TemporaryOriginError
from fusecache.origin.errors_from_answers import truncated_error, version_changed_error

if TYPE_CHECKING:
    from typing_extensions import Buffer

ASK_STORED_FORM = {"Accept-Encoding": "identity"}
"""Headers that ask a server not to code a body on its way."""

ASK_GCS_STORED_FORM = {"Accept-Encoding": "gzip"}
"""The same for GCS, which decodes an object that was stored with gzip unless the client says that it takes gzip, and
codes nothing that was stored plain."""

_MAX_HELD_SIZE = 64 << 20
"""Bytes of the largest object that is read from a server that tells neither range nor length: each of its ranges is
held in memory until the whole body has come."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_NO_CODINGS = {"", "identity", "aws-chunked"}
"""Content-Encoding of plain bytes; AWS clients leave `aws-chunked`, the coding of their uploads, in the metadata."""


def bytes_to_skip(
    where: str,
    status: int,
    content_range: str | None,
    content_length: int | None,
    size: int,
    offset: int,
    content_encoding: str | None = None,
) -> int:
    """How many bytes of the body to skip to get to `offset` of an object of `size` bytes.

    A 200 with the right Content-Range is taken as 206 (some servers do that), one without as the whole object. A coded
    body is taken only where the lengths say that the object is stored coded. Raises VersionChangedError when the object
    has another size, TemporaryOriginError on another range, OriginError when the body is not the stored form.
    """
    coding = (content_encoding or "").strip().lower()
    is_coded = coding not in _NO_CODINGS
    found = _CONTENT_RANGE.fullmatch(content_range or "")
    if found:
        first, last, total = int(found[1]), int(found[2]), found[3]
        if is_coded and (total != str(size) or content_length not in (None, last - first + 1)):
            raise _coded_error(where)
        if total != "*" and int(total) != size:
            raise version_changed_error(where)
        if first > offset:
            raise TemporaryOriginError(f"{where}: the server answered another range than was asked for")
        return offset - first
    if status == 200:
        if content_length != size and is_coded:
            raise _coded_error(where)
        if content_length is not None and content_length != size:
            raise version_changed_error(where)
        return offset
    raise TemporaryOriginError(f"{where}: the server answered {status} without saying which range")


def is_of_unknown_length(status: int, content_range: str | None, content_length: int | None) -> bool:
    """Whether only the end of the body will tell that it is the whole object and nothing else."""
    return status == 200 and content_length is None and not _CONTENT_RANGE.fullmatch(content_range or "")


def hold_until_end(
    where: str, body: Iterable[Buffer], size: int, offset: int, length: int
) -> Generator[Buffer, None, None]:
    """The bytes [offset, offset + length) of a body of unknown length, after it ended at exactly `size` bytes.

    Raises TemporaryOriginError when it ends before, OriginError when it goes on, or when `size` is too much to read
    again for each range.
    """
    if size > _MAX_HELD_SIZE:
        raise OriginError(
            f"{where}: the server tells neither range nor length, and the object has more than "
            f"{_MAX_HELD_SIZE >> 20} MiB: use a server that answers range requests"
        )
    held = bytearray()
    position = 0
    for chunk in body:
        view = memoryview(chunk)
        held += view[max(0, offset - position) : max(0, offset + length - position)]
        position += view.nbytes
        if position > size:
            raise OriginError(
                f"{where}: the server sends more bytes than the object has, and not as it is stored: "
                "store it without Content-Encoding, or use a server that answers range requests"
            )
    if position < size:
        raise truncated_error(where)
    yield memoryview(held)


def _coded_error(where: str) -> OriginError:
    return OriginError(
        f"{where}: the server sends it coded (Content-Encoding) and not as it is stored: "
        "switch compression off in the server, or store it without Content-Encoding"
    )
