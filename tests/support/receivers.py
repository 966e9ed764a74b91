"""A receiver of blocks that checks and keeps them."""

from __future__ import annotations

import xxhash


class CheckedBlocks:
    """Keeps all bytes; a block that does not have its checksum is not taken."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._checksum = 0
        self._block_start = 0

    def begin_block(self, checksum: int) -> None:
        """Note the checksum, and where the block begins."""
        self._checksum, self._block_start = checksum, len(self.data)

    def write(self, view: memoryview) -> None:
        """Keep the bytes."""
        self.data += view

    def end_block(self) -> bool:
        """Compare the block's checksum."""
        return (xxhash.xxh3_64_intdigest(self.data[self._block_start :]) or 1) == self._checksum
