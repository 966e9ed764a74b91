"""Content is a pure function of (key, version, offset): wrong offsets and mixed versions can't hide.

Every aligned 8 bytes are a 64-bit mix of their index and a seed made of key and version, so any range can be
made, and checked, on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_CHUNK = 16 << 20


def content(key: str, version: int | str, offset: int, length: int) -> bytes:
    """The bytes [offset, offset + length) of this version of this object."""
    if length <= 0:
        return b""
    seed = np.uint64(xxhash.xxh3_64_intdigest(f"{key}\0{version}".encode("utf-8", "surrogateescape")))
    first = offset // 8
    words = np.arange(first, -(-(offset + length) // 8), dtype=np.uint64)
    with np.errstate(over="ignore"):
        words *= _STEP
        words += seed
        words ^= words >> np.uint64(30)
        words *= _MIX
        words ^= words >> np.uint64(27)
    skip = offset - first * 8
    return words.astype("<u8", copy=False).tobytes()[skip : skip + length]


def check(data: Buffer, key: str, version: int | str, offset: int = 0) -> None:
    """Assert that `data` is what this version of the object holds at `offset`; names the first wrong byte."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), _CHUNK):
        part = view[start : start + _CHUNK]
        wanted = content(key, version, offset + start, len(part))
        if part != wanted:
            differs = np.frombuffer(part, np.uint8) != np.frombuffer(wanted, np.uint8)
            wrong = start + int(differs.argmax())
            raise AssertionError(
                f"{key!r} version {version}: byte {offset + wrong} is wrong "
                f"({int(differs.sum())} of {len(part)} bytes from {offset + start} differ)"
            )
