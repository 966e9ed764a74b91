"""The rules that decide which object keys become paths.

A key is a sequence of names joined by '/'. A key that ends in '/' marks a directory, also an empty one. Keys that no
path can spell are left out of the tree, counted by reason, and reported once.
"""

from __future__ import annotations

import enum

NAME_MAX = 255
"""Bytes of a name; what statfs reports and the kernel refuses to exceed (FUSE_NAME_MAX is larger)."""


class SkipReason(enum.Enum):
    """Why a key is not in the tree, in words for the log."""

    EMPTY = "an empty name between slashes"
    DOTS = "a '.' or '..' component"
    NUL = "a NUL character"
    LONG = f"a name of more than {NAME_MAX} bytes"
    ENCODING = "characters that have no UTF-8 form"
    SHADOWED = "the same path as a directory, which wins"
    MARKER = "a directory marker with content, shown as a directory"


def find_name_problem(name: str) -> SkipReason | None:
    """The reason why one component of a key can't be a name in a directory; None if it can."""
    if not name:
        return SkipReason.EMPTY
    if name in (".", ".."):
        return SkipReason.DOTS
    if "\0" in name:
        return SkipReason.NUL
    if name.isascii():
        return SkipReason.LONG if len(name) > NAME_MAX else None
    try:
        encoded = encode_name(name)
    except UnicodeEncodeError:
        return SkipReason.ENCODING
    return SkipReason.LONG if len(encoded) > NAME_MAX else None


def encode_name(name: str) -> bytes:
    """The bytes the kernel sees. Raises UnicodeEncodeError for lone surrogates that stand for no byte."""
    return name.encode("utf-8", "surrogateescape")
