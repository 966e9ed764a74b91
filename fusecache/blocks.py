"""Block arithmetic. A block is `block_size` bytes of an object, the last one may be shorter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def block_count(size: int, block_size: int) -> int:
    """Blocks of an object of `size` bytes; 0 for an empty object."""
    return -(-size // block_size)


def block_range(offset: int, length: int, size: int, block_size: int) -> range:
    """Blocks that hold the bytes [offset, offset + length) as far as the object has them."""
    end = min(offset + length, size)
    if offset >= end:
        return range(0)
    return range(offset // block_size, -(-end // block_size))


def block_length(index: int, size: int, block_size: int) -> int:
    """Length in bytes of block `index` of an object of `size` bytes."""
    return min(block_size, size - index * block_size)


def contiguous_ranges(blocks: Iterable[int], max_blocks: int) -> Iterator[range]:
    """Join ascending block indexes into contiguous ranges of at most `max_blocks` blocks.

    >>> list(contiguous_ranges([0, 1, 2, 5, 6], 2))
    [range(0, 2), range(2, 3), range(5, 7)]
    """
    start = stop = -1
    for block in blocks:
        if block == stop and stop - start < max_blocks:
            stop += 1
            continue
        if stop > start >= 0:
            yield range(start, stop)
        start, stop = block, block + 1
    if stop > start >= 0:
        yield range(start, stop)
