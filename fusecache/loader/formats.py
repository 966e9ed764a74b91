"""Where the tensors lie in a file of weights: safetensors, GGUF, the zip archives of torch.save. Pure.

`examine(name, size)` is a generator that asks for byte ranges of the file, is sent their bytes, and returns a Layout.
It does no I/O, so that the caller decides when and from where the bytes come. A file is what somebody put into a
bucket: every length and offset in it is checked before it is used, and no more than HEAD_LIMIT bytes of it are looked
at. FormatError says in a few words why there is no layout; such a file is fetched in its own order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

HEAD_LIMIT = 16 << 20
"""Bytes of a header, at most. Real ones have kilobytes in safetensors (a model of 60,000 tensors in one file: 8 MiB)
and up to 10 MiB in GGUF, which holds the vocabulary."""
FIRST = 64 << 10
"""Bytes asked for where it is not known yet how many are needed."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MOST_TENSORS = 1 << 20
_MOST_DIMENSIONS = 8

Asking = Generator[tuple[int, int], bytes, "Layout"]
"""Yields (offset, length), is sent so many bytes."""


class FormatError(Exception):
    """The file is not what its name says, or lies about itself."""


@dataclass(frozen=True)
class Layout:
    """`head` are the ranges [start, stop) that a reader needs before any tensor, `tensors` those of the tensors, in
    ascending order and without overlaps; in bytes of the file."""

    head: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[int, int], ...]


def has_layout(name: str) -> bool:
    """Whether the name is that of a format known here."""
    return _parser(name) is not None


def first_ranges(name: str, size: int) -> list[tuple[int, int]]:
    """The ranges that will be looked at first, known by the name alone: (offset, length)."""
    found = [(0, min(size, FIRST))]
    if _parser(name) is _zip:
        found.append((max(0, size - FIRST), min(size, FIRST)))
    return found


def examine(name: str, size: int) -> Asking:
    """The layout of a file of `size` bytes. Raises FormatError."""
    parser = _parser(name)
    if parser is None:
        raise FormatError("a format that is not known")
    layout = yield from parser(size)
    return layout


def _parser(name: str) -> Callable[[int], Asking] | None:
    suffix = name.lower().rpartition(".")[2]
    return {"safetensors": _safetensors, "gguf": _gguf, "bin": _zip, "pt": _zip, "pth": _zip}.get(suffix)


def _in_order(tensors: list[tuple[int, int]], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Checked: within [start, stop), without overlaps."""
    tensors.sort()
    at = start
    for first, last in tensors:
        if first < at or last > stop:
            raise FormatError("tensors overlap, or lie outside of the file")
        at = last
    return tuple(tensors)


# -- safetensors: the length of a JSON header, the header, the tensors


def _safetensors(size: int) -> Asking:
    if size < 10:
        raise FormatError("shorter than any header")
    first = yield 0, min(size, FIRST)
    (length,) = struct.unpack_from("<Q", first)
    if length > size - 8:
        raise FormatError("the header is said to be longer than the file")
    if length > HEAD_LIMIT:
        raise FormatError(f"a header of {length} bytes")
    text = first[8 : 8 + length]
    if len(text) < length:
        text += yield len(first), length - len(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError("the header is not JSON") from None
    if not isinstance(found, dict):
        raise FormatError("the header is not a table of tensors")
    data = 8 + length
    tensors = []
    for name, entry in found.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(at) is int for at in offsets)):
            raise FormatError("a tensor without offsets")
        start, stop = offsets
        if not 0 <= start <= stop <= size - data:
            raise FormatError("a tensor lies outside of the file")
        if start < stop:
            tensors.append((data + start, data + stop))
    return Layout(((0, data),), _in_order(tensors, data, size))


# -- GGUF: counts, metadata, the tensors' names and offsets, padding, the tensors

_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type."""
_GGUF_STRING, _GGUF_ARRAY, _GGUF_UINT32 = 8, 9, 4
_GGUF_DEPTH = 4


class _Cursor:
    """Reads on in the first bytes of a file, and asks for more of them when it must."""

    def __init__(self, size: int) -> None:
        self.at = 0
        self._size = size
        self._have = b""

    def need(self, length: int) -> Generator[tuple[int, int], bytes, None]:
        """Until `length` bytes are there, behind where it is."""
        end = self.at + length
        if end > min(self._size, HEAD_LIMIT):
            raise FormatError("the header is longer than the file, or than any header")
        if end > len(self._have):
            # twice as many each time, so that a header of some MiB takes a few questions
            stop = min(self._size, HEAD_LIMIT, max(end, 2 * len(self._have), FIRST))
            self._have += yield len(self._have), stop - len(self._have)

    def take(self, form: struct.Struct) -> Generator[tuple[int, int], bytes, int]:
        """The next number."""
        if self.at + form.size > len(self._have):
            yield from self.need(form.size)
        (value,) = form.unpack_from(self._have, self.at)
        self.at += form.size
        return int(value)

    def skip(self, length: int) -> Generator[tuple[int, int], bytes, None]:
        """Pass over so many bytes, which have to be there."""
        if self.at + length > len(self._have):
            yield from self.need(length)
        self.at += length

    def skip_texts(self, count: int) -> Generator[tuple[int, int], bytes, None]:
        """Pass over strings: a vocabulary has some 100,000, so they are not worth a generator each."""
        while count:
            have, at = self._have, self.at
            while count and at + 8 <= len(have):
                (length,) = _U64.unpack_from(have, at)
                if at + 8 + length > len(have):
                    break
                at += 8 + length
                count -= 1
            self.at = at
            if count:
                yield from self.need(8)
                (length,) = _U64.unpack_from(self._have, at)
                yield from self.need(8 + length)

    def text(self, length: int) -> Generator[tuple[int, int], bytes, bytes]:
        """The next bytes."""
        yield from self.skip(length)
        return self._have[self.at - length : self.at]


def _gguf(size: int) -> Asking:
    cursor = _Cursor(size)
    if (yield from cursor.text(4)) != b"GGUF":
        raise FormatError("not GGUF")
    if (yield from cursor.take(_U32)) not in (2, 3):
        raise FormatError("a version of GGUF that is not known, or big-endian")
    count = yield from cursor.take(_U64)
    pairs = yield from cursor.take(_U64)
    if count > _MOST_TENSORS or pairs > _MOST_TENSORS:
        raise FormatError("more tensors or metadata than can be")
    alignment = 32
    for _ in range(pairs):
        key = yield from cursor.text((yield from cursor.take(_U64)))
        kind = yield from cursor.take(_U32)
        if key == b"general.alignment" and kind == _GGUF_UINT32:
            alignment = yield from cursor.take(_U32)
        else:
            yield from _gguf_value(cursor, kind, 0)
    if not 1 <= alignment <= 1 << 20:
        raise FormatError("an alignment that can't be")
    offsets = []
    for _ in range(count):
        yield from cursor.skip((yield from cursor.take(_U64)))
        dimensions = yield from cursor.take(_U32)
        if dimensions > _MOST_DIMENSIONS:
            raise FormatError("a tensor of too many dimensions")
        yield from cursor.skip(8 * dimensions + 4)
        offsets.append((yield from cursor.take(_U64)))
    data = -(-cursor.at // alignment) * alignment
    offsets.sort()
    if offsets and data + offsets[-1] >= size:
        raise FormatError("a tensor lies outside of the file")
    # the sizes follow from types and dimensions, or, without a table of types, from where the next one begins
    ends = [*(data + offset for offset in offsets[1:]), size]
    tensors = [
        (data + start, stop) for start, stop in zip(offsets, ends, strict=False) if data + start < stop
    ]
    return Layout(((0, min(data, size)),), _in_order(tensors, data, size))


def _gguf_value(cursor: _Cursor, kind: int, depth: int) -> Generator[tuple[int, int], bytes, None]:
    if kind in _GGUF_SIZES:
        yield from cursor.skip(_GGUF_SIZES[kind])
    elif kind == _GGUF_STRING:
        yield from cursor.skip((yield from cursor.take(_U64)))
    elif kind == _GGUF_ARRAY and depth < _GGUF_DEPTH:
        inner = yield from cursor.take(_U32)
        length = yield from cursor.take(_U64)
        if inner in _GGUF_SIZES:
            yield from cursor.skip(length * _GGUF_SIZES[inner])
        elif inner == _GGUF_STRING:
            yield from cursor.skip_texts(length)
        else:
            # each element takes bytes of a bounded header, so a lying length ends in FormatError
            for _ in range(length):
                yield from _gguf_value(cursor, inner, depth + 1)
    else:
        raise FormatError("a type of metadata that is not known")


# -- torch.save: a zip archive, not compressed, a tensor per entry below data/

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LARGE = 0xFFFFFFFF
_EXTRA = struct.Struct("<2H")


def _zip(size: int) -> Asking:
    tail_length = min(size, FIRST)
    tail = yield size - tail_length, tail_length
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise FormatError("not a zip archive")
    _, _, _, _, entries, length, start, _ = _END.unpack_from(tail, at)
    end = size - tail_length + at
    if (start == _LARGE or length == _LARGE or entries == 0xFFFF) and at >= _END64_LOCATOR.size:
        signature, _, where, _ = _END64_LOCATOR.unpack_from(tail, at - _END64_LOCATOR.size)
        if signature == b"PK\6\7":
            if not 0 <= where <= end - _END64.size:
                raise FormatError("the end of the archive lies outside of it")
            record = yield where, _END64.size
            signature, _, _, _, _, _, _, entries, length, start = _END64.unpack(record)
            if signature != b"PK\6\6":
                raise FormatError("not a zip archive")
            end = where
    if start + length > end:
        raise FormatError("the directory lies outside of the archive")
    if length > HEAD_LIMIT or entries > _MOST_TENSORS:
        raise FormatError(f"a directory of {length} bytes")
    directory = (yield start, length) if length else b""
    if len(directory) < length:
        raise FormatError("the directory is truncated")
    return _zip_layout(_zip_entries(directory, entries), start, size)


def _zip_entries(directory: bytes, entries: int) -> list[tuple[int, bytes]]:
    """(offset, name) of the entries, in their order in the archive."""
    found, at = [], 0
    for _ in range(entries):
        if at + _ENTRY.size > len(directory):
            raise FormatError("the directory is truncated")
        fields = _ENTRY.unpack_from(directory, at)
        signature, method, packed, unpacked = fields[0], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, offset = fields[10], fields[11], fields[12], fields[16]
        if signature != b"PK\1\2":
            raise FormatError("the directory is damaged")
        if method != 0:
            raise FormatError("a compressed archive")
        at += _ENTRY.size
        name = directory[at : at + name_length]
        if offset == _LARGE:
            before = 8 * ((packed == _LARGE) + (unpacked == _LARGE))
            offset = _zip_offset(directory[at + name_length : at + name_length + extra_length], before)
        found.append((offset, name))
        at += name_length + extra_length + comment_length
    found.sort()
    return found


def _zip_offset(extra: bytes, before: int) -> int:
    """The offset in a zip64 field, behind the sizes that are in it, too."""
    at = 0
    while at + _EXTRA.size <= len(extra):
        kind, length = _EXTRA.unpack_from(extra, at)
        at += _EXTRA.size
        if kind == 1 and length >= before + 8 and at + before + 8 <= len(extra):
            return int(_U64.unpack_from(extra, at + before)[0])
        at += length
    raise FormatError("an entry without an offset")


def _zip_layout(entries: Sequence[tuple[int, bytes]], directory: int, size: int) -> Layout:
    """Entries reach to where the next one begins: a header of their own is in front of them."""
    head: list[tuple[int, int]] = []
    tensors: list[tuple[int, int]] = []
    ends = [*(offset for offset, _ in entries[1:]), directory]
    for (offset, name), stop in zip(entries, ends, strict=False):
        if not 0 <= offset < stop <= directory:
            raise FormatError("entries overlap, or lie outside of the archive")
        # archive/data/17 is a tensor; archive/data.pkl says which
        folder = name.split(b"/")[-2:-1]
        (tensors if folder == [b"data"] else head).append((offset, stop))
    if sum(stop - start for start, stop in head) > HEAD_LIMIT:
        raise FormatError("more beside the tensors than can be")
    return Layout((*head, (directory, size)), tuple(tensors))
