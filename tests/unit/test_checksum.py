"""The checksum of a block."""

from __future__ import annotations

import xxhash

from fusecache.checksum import block_checksum, nonzero_checksum


def test_a_block_has_the_hash_of_its_bytes() -> None:
    digest = xxhash.xxh3_64()
    digest.update(b"block")
    assert block_checksum(digest) == xxhash.xxh3_64_intdigest(b"block")


def test_no_block_has_the_checksum_that_means_absent() -> None:
    class Zero:
        def intdigest(self) -> int:
            return 0

    assert block_checksum(Zero()) == 1
    assert [nonzero_checksum(value) for value in (0, 1, 2**64 - 1)] == [1, 1, 2**64 - 1]
