"""Block arithmetic: every byte of an object is in exactly one block."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fusecache.blocks import block_count, block_length, block_range, contiguous_ranges

sizes = st.integers(0, 1 << 40)
block_sizes = st.sampled_from([1, 7, 4096, 1 << 20])


@given(st.integers(0, 10_000), st.sampled_from([1, 7, 4096]))
def test_blocks_add_up_to_the_object(size: int, block_size: int) -> None:
    lengths = [block_length(i, size, block_size) for i in range(block_count(size, block_size))]
    assert sum(lengths) == size
    assert all(length == block_size for length in lengths[:-1])
    assert all(0 < length <= block_size for length in lengths)


@given(sizes, st.integers(0, 1 << 40), st.integers(0, 1 << 40), block_sizes)
def test_range_is_the_blocks_that_hold_the_bytes(
    size: int, offset: int, length: int, block_size: int
) -> None:
    blocks = block_range(offset, length, size, block_size)
    end = min(offset + length, size)
    if offset >= end:
        assert len(blocks) == 0
        return
    assert blocks.start * block_size <= offset < (blocks.start + 1) * block_size
    assert (blocks.stop - 1) * block_size < end <= blocks.stop * block_size
    assert blocks.stop <= block_count(size, block_size)


@given(st.sets(st.integers(0, 200)), st.integers(1, 20))
def test_runs_cover_each_block_once_and_are_as_long_as_they_may(blocks: set[int], limit: int) -> None:
    ascending = sorted(blocks)
    joined = list(contiguous_ranges(ascending, limit))
    assert [b for run in joined for b in run] == ascending
    assert all(0 < len(run) <= limit for run in joined)
    for first, second in pairwise(joined):
        assert first.stop < second.start or len(first) == limit


def test_an_empty_object_has_no_blocks() -> None:
    assert block_count(0, 4096) == 0
    assert list(block_range(0, 100, 0, 4096)) == []
    assert list(contiguous_ranges([], 4)) == []
