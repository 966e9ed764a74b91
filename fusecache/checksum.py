"""The checksum of a block: its xxh3_64, and never 0, which means "absent" in the store's files and on the wire."""

from __future__ import annotations

from typing import Protocol


class Digest(Protocol):
    """A running hash, as `xxhash.xxh3_64()` makes one."""

    def intdigest(self) -> int:
        """The hash of what the digest has been fed, as an integer."""
        ...


def block_checksum(digest: Digest) -> int:
    """The checksum of the block whose bytes the digest has been fed: an integer from 1 to 2**64 - 1."""
    return nonzero_checksum(digest.intdigest())


def nonzero_checksum(xxh3_64: int) -> int:
    """The checksum that stands for this hash: 1 for 0, else the hash itself."""
    return xxh3_64 or 1
