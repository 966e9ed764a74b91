"""Where the tensors lie in a file of weights: safetensors, GGUF, the zip archives of torch.save. Pure.

`parse_layout(name, size)` is a generator that asks for byte ranges of the file, is sent their bytes, and returns a
TensorLayout. It does no I/O, so that the caller decides when and from where the bytes come. A file may hold anything:
every length and offset in it is checked before it is used, and no more than MAX_HEADER_BYTES of it are looked at.
FormatError says in a few words why there is no layout; such a file is fetched in its own order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

MAX_HEADER_BYTES = 16 << 20
"""Bytes of a header, at most. Real ones have kilobytes in safetensors (a model of 60,000 tensors in one file: 8 MiB)
and up to 10 MiB in GGUF, which holds the vocabulary."""
FIRST_READ_BYTES = 64 << 10
"""Bytes asked for where it is not known yet how many are needed."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MAX_TENSORS = 1 << 20
_MAX_DIMENSIONS = 8

LayoutRequests = Generator[tuple[int, int], bytes, "TensorLayout"]
"""Yields (offset, length), is sent so many bytes."""


class FormatError(Exception):
    """The file is not what its name says, or lies about itself."""


@dataclass(frozen=True)
class TensorLayout:
    """`header_ranges` are the ranges [start, stop) that a reader needs before any tensor, `tensor_ranges` those of the
    tensors, in ascending order and without overlaps; in bytes of the file."""

    header_ranges: tuple[tuple[int, int], ...]
    tensor_ranges: tuple[tuple[int, int], ...]


def is_known_format(name: str) -> bool:
    """Whether the name is that of a format known here."""
    return _parser_of(name) is not None


def first_header_ranges(name: str, size: int) -> list[tuple[int, int]]:
    """The ranges that will be looked at first, known by the name alone: (offset, length)."""
    found = [(0, min(size, FIRST_READ_BYTES))]
    if _parser_of(name) is _parse_zip:
        found.append((max(0, size - FIRST_READ_BYTES), min(size, FIRST_READ_BYTES)))
    return found


def parse_layout(name: str, size: int) -> LayoutRequests:
    """The layout of a file of `size` bytes. Raises FormatError."""
    parser = _parser_of(name)
    if parser is None:
        raise FormatError("a format that is not known")
    layout = yield from parser(size)
    return layout


def _parser_of(name: str) -> Callable[[int], LayoutRequests] | None:
    suffix = name.lower().rpartition(".")[2]
    return {
        "safetensors": _parse_safetensors,
        "gguf": _parse_gguf,
        "bin": _parse_zip,
        "pt": _parse_zip,
        "pth": _parse_zip,
    }.get(suffix)


def _checked_ranges(tensors: list[tuple[int, int]], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Checked: within [start, stop), without overlaps."""
    tensors.sort()
    at = start
    for first, last in tensors:
        if first < at or last > stop:
            raise FormatError("tensors overlap, or lie outside of the file")
        at = last
    return tuple(tensors)


# -- safetensors: the length of a JSON header, the header, the tensors


def _parse_safetensors(size: int) -> LayoutRequests:
    if size < 10:
        raise FormatError("shorter than any header")
    first = yield 0, min(size, FIRST_READ_BYTES)
    (length,) = struct.unpack_from("<Q", first)
    if length > size - 8:
        raise FormatError("the header is said to be longer than the file")
    if length > MAX_HEADER_BYTES:
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
    return TensorLayout(((0, data),), _checked_ranges(tensors, data, size))


# -- GGUF: counts, metadata, the tensors' names and offsets, padding, the tensors

_GGUF_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type."""
_GGUF_STRING, _GGUF_ARRAY, _GGUF_UINT32 = 8, 9, 4
_MAX_GGUF_DEPTH = 4


class _Cursor:
    """Reads on in the first bytes of a file, and asks for more of them when it must."""

    def __init__(self, size: int) -> None:
        self.position = 0
        self._size = size
        self._bytes_read = b""

    def require_bytes(self, length: int) -> Generator[tuple[int, int], bytes, None]:
        """Until `length` bytes are there, behind where it is."""
        end = self.position + length
        if end > min(self._size, MAX_HEADER_BYTES):
            raise FormatError("the header is longer than the file, or than any header")
        if end > len(self._bytes_read):
            # twice as many each time, so that a header of some MiB takes a few questions
            stop = min(self._size, MAX_HEADER_BYTES, max(end, 2 * len(self._bytes_read), FIRST_READ_BYTES))
            self._bytes_read += yield len(self._bytes_read), stop - len(self._bytes_read)

    def read_number(self, form: struct.Struct) -> Generator[tuple[int, int], bytes, int]:
        """The next number."""
        if self.position + form.size > len(self._bytes_read):
            yield from self.require_bytes(form.size)
        (value,) = form.unpack_from(self._bytes_read, self.position)
        self.position += form.size
        return int(value)

    def skip_bytes(self, length: int) -> Generator[tuple[int, int], bytes, None]:
        """Pass over so many bytes, which have to be there."""
        if self.position + length > len(self._bytes_read):
            yield from self.require_bytes(length)
        self.position += length

    def skip_strings(self, count: int) -> Generator[tuple[int, int], bytes, None]:
        """Pass over strings: a vocabulary has some 100,000, so they are not worth a generator each."""
        while count:
            have, at = self._bytes_read, self.position
            while count and at + 8 <= len(have):
                (length,) = _U64.unpack_from(have, at)
                if at + 8 + length > len(have):
                    break
                at += 8 + length
                count -= 1
            self.position = at
            if count:
                yield from self.require_bytes(8)
                (length,) = _U64.unpack_from(self._bytes_read, at)
                yield from self.require_bytes(8 + length)

    def read_bytes(self, length: int) -> Generator[tuple[int, int], bytes, bytes]:
        """The next bytes."""
        yield from self.skip_bytes(length)
        return self._bytes_read[self.position - length : self.position]


def _parse_gguf(size: int) -> LayoutRequests:
    cursor = _Cursor(size)
    if (yield from cursor.read_bytes(4)) != b"GGUF":
        raise FormatError("not GGUF")
    if (yield from cursor.read_number(_U32)) not in (2, 3):
        raise FormatError("a version of GGUF that is not known, or big-endian")
    count = yield from cursor.read_number(_U64)
    pairs = yield from cursor.read_number(_U64)
    if count > _MAX_TENSORS or pairs > _MAX_TENSORS:
        raise FormatError("more tensors or metadata than can be")
    alignment = 32
    for _ in range(pairs):
        key = yield from cursor.read_bytes((yield from cursor.read_number(_U64)))
        kind = yield from cursor.read_number(_U32)
        if key == b"general.alignment" and kind == _GGUF_UINT32:
            alignment = yield from cursor.read_number(_U32)
        else:
            yield from _skip_gguf_value(cursor, kind, 0)
    if not 1 <= alignment <= 1 << 20:
        raise FormatError("an alignment that can't be")
    offsets = []
    for _ in range(count):
        yield from cursor.skip_bytes((yield from cursor.read_number(_U64)))
        dimensions = yield from cursor.read_number(_U32)
        if dimensions > _MAX_DIMENSIONS:
            raise FormatError("a tensor of too many dimensions")
        yield from cursor.skip_bytes(8 * dimensions + 4)
        offsets.append((yield from cursor.read_number(_U64)))
    data = -(-cursor.position // alignment) * alignment
    offsets.sort()
    if offsets and data + offsets[-1] >= size:
        raise FormatError("a tensor lies outside of the file")
    # the sizes follow from types and dimensions, or, without a table of types, from where the next one begins
    ends = [*(data + offset for offset in offsets[1:]), size]
    tensors = [
        (data + start, stop) for start, stop in zip(offsets, ends, strict=False) if data + start < stop
    ]
    return TensorLayout(((0, min(data, size)),), _checked_ranges(tensors, data, size))


def _skip_gguf_value(cursor: _Cursor, kind: int, depth: int) -> Generator[tuple[int, int], bytes, None]:
    if kind in _GGUF_VALUE_SIZES:
        yield from cursor.skip_bytes(_GGUF_VALUE_SIZES[kind])
    elif kind == _GGUF_STRING:
        yield from cursor.skip_bytes((yield from cursor.read_number(_U64)))
    elif kind == _GGUF_ARRAY and depth < _MAX_GGUF_DEPTH:
        inner = yield from cursor.read_number(_U32)
        length = yield from cursor.read_number(_U64)
        if inner in _GGUF_VALUE_SIZES:
            yield from cursor.skip_bytes(length * _GGUF_VALUE_SIZES[inner])
        elif inner == _GGUF_STRING:
            yield from cursor.skip_strings(length)
        else:
            # each element takes bytes of a bounded header, so a lying length ends in FormatError
            for _ in range(length):
                yield from _skip_gguf_value(cursor, inner, depth + 1)
    else:
        raise FormatError("a type of metadata that is not known")


# -- torch.save: a zip archive, not compressed, a tensor per entry below data/

_ZIP_END = struct.Struct("<4s4H2IH")
_ZIP_END64_LOCATOR = struct.Struct("<4sIQI")
_ZIP_END64 = struct.Struct("<4sQ2H2I4Q")
_ZIP_ENTRY = struct.Struct("<4s6H3I5H2I")
_ZIP64_MARKER = 0xFFFFFFFF
_ZIP_EXTRA = struct.Struct("<2H")


def _parse_zip(size: int) -> LayoutRequests:
    tail_length = min(size, FIRST_READ_BYTES)
    tail = yield size - tail_length, tail_length
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _ZIP_END.size > len(tail):
        raise FormatError("not a zip archive")
    _, _, _, _, entries, length, start, _ = _ZIP_END.unpack_from(tail, at)
    end = size - tail_length + at
    if (
        start == _ZIP64_MARKER or length == _ZIP64_MARKER or entries == 0xFFFF
    ) and at >= _ZIP_END64_LOCATOR.size:
        signature, _, where, _ = _ZIP_END64_LOCATOR.unpack_from(tail, at - _ZIP_END64_LOCATOR.size)
        if signature == b"PK\6\7":
            if not 0 <= where <= end - _ZIP_END64.size:
                raise FormatError("the end of the archive lies outside of it")
            record = yield where, _ZIP_END64.size
            signature, _, _, _, _, _, _, entries, length, start = _ZIP_END64.unpack(record)
            if signature != b"PK\6\6":
                raise FormatError("not a zip archive")
            end = where
    if start + length > end:
        raise FormatError("the directory lies outside of the archive")
    if length > MAX_HEADER_BYTES or entries > _MAX_TENSORS:
        raise FormatError(f"a directory of {length} bytes")
    directory = (yield start, length) if length else b""
    if len(directory) < length:
        raise FormatError("the directory is truncated")
    return _zip_layout(_zip_entries(directory, entries), start, size)


def _zip_entries(directory: bytes, entries: int) -> list[tuple[int, bytes]]:
    """(offset, name) of the entries, in their order in the archive."""
    found, at = [], 0
    for _ in range(entries):
        if at + _ZIP_ENTRY.size > len(directory):
            raise FormatError("the directory is truncated")
        fields = _ZIP_ENTRY.unpack_from(directory, at)
        signature, method, packed, unpacked = fields[0], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, offset = fields[10], fields[11], fields[12], fields[16]
        if signature != b"PK\1\2":
            raise FormatError("the directory is damaged")
        if method != 0:
            raise FormatError("a compressed archive")
        at += _ZIP_ENTRY.size
        name = directory[at : at + name_length]
        if offset == _ZIP64_MARKER:
            before = 8 * ((packed == _ZIP64_MARKER) + (unpacked == _ZIP64_MARKER))
            offset = _zip64_offset(directory[at + name_length : at + name_length + extra_length], before)
        found.append((offset, name))
        at += name_length + extra_length + comment_length
    found.sort()
    return found


def _zip64_offset(extra: bytes, offset_position: int) -> int:
    """The offset in a zip64 field, behind the sizes that are in it, too."""
    at = 0
    while at + _ZIP_EXTRA.size <= len(extra):
        kind, length = _ZIP_EXTRA.unpack_from(extra, at)
        at += _ZIP_EXTRA.size
        if kind == 1 and length >= offset_position + 8 and at + offset_position + 8 <= len(extra):
            return int(_U64.unpack_from(extra, at + offset_position)[0])
        at += length
    raise FormatError("an entry without an offset")


def _zip_layout(entries: Sequence[tuple[int, bytes]], directory: int, size: int) -> TensorLayout:
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
    if sum(stop - start for start, stop in head) > MAX_HEADER_BYTES:
        raise FormatError("more beside the tensors than can be")
    return TensorLayout((*head, (directory, size)), tuple(tensors))
