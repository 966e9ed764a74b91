"""Records the reads of a load, and makes an access profile of them: the blocks that the kernel asked for, in the order
of the first request. Pure.

Theory of operation. A READ says, blurred, which blocks a reader will look at: the kernel reads ahead of a sequential
reader, and around the page of a fault. So READs are taken down in runs, each a stretch of a file that grew in place,
and at the end the tensors (tensor_formats.py) say what the reader was after: blocks at either end of a tensor, no more
than the kernel may have asked for on its own, are left out when the rest of that tensor was not read.

Ranks read at the same time. A run that another process's READs come between is ended after MAX_RUN_BLOCKS blocks, so
that the recording alternates between the ranks as they did.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence

from fusecache.prefetch.models.tensor_formats import TensorLayout
from fusecache.prefetch.profiles.access_profile import AccessProfile, ProfileRun

MAX_RUN_BLOCKS = 16
"""Blocks: about what one flight brings."""
MAX_RANKS = 255
WHOLE_SHARE = 0.9
"""Share of a tensor, or a file, from which on it counts as read whole: the page cache answers some reads by itself."""
MIN_SHARE_READ = 0.05
"""Share of the model below which it was looked at, and not loaded."""

_REORDERED_BLOCKS = 8
"""Blocks by which READs of one reader come out of order: they are taken up by several threads."""
_MAX_GROWING_RUNS = 4
"""Readers of one file at the same time, as far as they are told apart."""


def readahead_slack(readahead_bytes: int, block_size: int) -> int:
    """Blocks by which the kernel, which reads so many bytes ahead, may ask for more than a reader is after."""
    return -(-2 * readahead_bytes // block_size) + 1


class _RecordedFile:
    """The blocks of one file that were asked for: `run_numbers` has for each block the number of its run, 0: it was not
    asked for."""

    def __init__(self, blocks: int) -> None:
        self.requested = bytearray(blocks)
        self.run_numbers = array("I", bytes(4 * blocks))
        self.growing_runs: list[_GrowingRun] = []
        self.is_passthrough = False


class _GrowingRun:
    """A run that may still grow."""

    def __init__(self, number: int, start: int, stop: int) -> None:
        self.number = number
        self.start = start
        self.stop = stop
        self.length_when_newest = 0


class ProfileRecorder:
    """Records one load of the model `model_id`, whose files have `block_counts` blocks; the kernel reads
    `readahead_bytes` ahead. Thread-safe; its lock is a leaf."""

    def __init__(
        self, model_id: str, block_size: int, block_counts: Sequence[int], readahead_bytes: int
    ) -> None:
        self._model_id = model_id
        self._block_size = block_size
        self._block_counts = tuple(block_counts)
        self._readahead_slack = readahead_slack(readahead_bytes, block_size)
        self._files: dict[int, _RecordedFile] = {}
        self._runs: list[tuple[int, int]] = []
        """(file, rank) of each run, in order."""
        self._ranks: dict[int, int] = {}
        self._lock = threading.Lock()

    def file_opened(self, file: int, *, is_passthrough: bool = False) -> None:
        """A file was opened; `is_passthrough`: the kernel answers its reads, so that it counts as read whole."""
        with self._lock:
            found = self._recorded_file(file)
            if is_passthrough and not found.is_passthrough:
                found.is_passthrough = True
                if 0 in found.requested:
                    self._begin_run(found, file, 0, self._block_counts[file], 0)

    def record_read(self, file: int, start: int, stop: int, process: int) -> None:
        """A READ of the blocks [start, stop) came from this process. Takes microseconds."""
        found = self._files.get(file)
        if found is not None and found.requested.find(0, start, stop) < 0:
            return  # without the lock: blocks that were asked for stay so
        with self._lock:
            found = self._recorded_file(file)
            first = found.requested.find(0, start, stop)
            while first >= 0:
                last = found.requested.find(1, first, stop)
                last = stop if last < 0 else last
                self._extend_run(found, file, first, last, process)
                first = found.requested.find(0, last, stop)

    def _recorded_file(self, file: int) -> _RecordedFile:
        found = self._files.get(file)
        if found is None:
            found = self._files[file] = _RecordedFile(self._block_counts[file])
        return found

    def _extend_run(self, found: _RecordedFile, file: int, start: int, stop: int, process: int) -> None:
        rank = self._ranks.get(process)
        if rank is None:
            rank = self._ranks[process] = min(len(self._ranks), MAX_RANKS)
        newest = len(self._runs)
        for run in found.growing_runs:
            near = run.start - _REORDERED_BLOCKS <= start and stop <= run.stop + _REORDERED_BLOCKS + (
                stop - start
            )
            alone = run.number == newest
            if near and (alone or run.stop - run.start - run.length_when_newest < MAX_RUN_BLOCKS):
                if alone:
                    run.length_when_newest = run.stop - run.start
                run.start, run.stop = min(run.start, start), max(run.stop, stop)
                self._mark_requested(found, start, stop, run.number)
                return
        self._begin_run(found, file, start, stop, rank)

    def _begin_run(self, found: _RecordedFile, file: int, start: int, stop: int, rank: int) -> None:
        self._runs.append((file, rank))
        number = len(self._runs)
        found.growing_runs = [_GrowingRun(number, start, stop), *found.growing_runs[: _MAX_GROWING_RUNS - 1]]
        self._mark_requested(found, start, stop, number)

    def _mark_requested(self, found: _RecordedFile, start: int, stop: int, number: int) -> None:
        for block in range(start, stop):
            if not found.requested[block]:
                found.run_numbers[block] = number
        found.requested[start:stop] = b"\1" * (stop - start)

    def make_profile(self, layouts: Mapping[int, TensorLayout]) -> AccessProfile | None:
        """The profile of the reads so far; None: they are too few for a load. Where not all files were opened, the load
        may have been broken off, and the files that were opened count as read whole. `layouts` are those of the files
        whose tensors are known."""
        with self._lock:
            complete = len(self._files) == len(self._block_counts)
            kept: dict[int, bytearray] = {}
            for file, found in self._files.items():
                wanted = bytearray(found.requested)
                if not found.is_passthrough and file in layouts:
                    drop_readahead_blocks(wanted, layouts[file], self._block_size, self._readahead_slack)
                if found.is_passthrough or not complete or wanted.count(1) >= WHOLE_SHARE * len(wanted):
                    wanted = bytearray(b"\1" * len(wanted))
                kept[file] = wanted
            if sum(wanted.count(1) for wanted in kept.values()) < MIN_SHARE_READ * sum(self._block_counts):
                return None
            return AccessProfile(self._model_id, self._block_size, tuple(self._collect_runs(kept)))

    def _collect_runs(self, needed_blocks: Mapping[int, bytearray]) -> list[ProfileRun]:
        parts: dict[int, list[ProfileRun]] = {}
        late: list[ProfileRun] = []
        for file, wanted in needed_blocks.items():
            numbers = self._files[file].run_numbers
            start = 0
            for block in range(1, len(wanted) + 1):
                same = block < len(wanted) and (wanted[block], numbers[block]) == (
                    wanted[start],
                    numbers[start],
                )
                if same:
                    continue
                if wanted[start]:
                    number = numbers[start]
                    if number:
                        parts.setdefault(number, []).append(
                            ProfileRun(file, start, block, self._runs[number - 1][1])
                        )
                    else:
                        late.append(ProfileRun(file, start, block))
                start = block
        return [run for number in sorted(parts) for run in parts[number]] + late


def drop_readahead_blocks(
    needed_blocks: bytearray, layout: TensorLayout, block_size: int, readahead_slack: int
) -> None:
    """Take away the blocks that were asked for only because they lie beside what a reader was after: at most
    `readahead_slack` blocks at either end of a tensor that was not read, in blocks that hold no other one."""
    needed = bytearray(len(needed_blocks))
    for start, stop in layout.header_ranges:
        _cover_bytes(needed, start, stop, block_size)
    for start, stop in layout.tensor_ranges:
        first, last = -(-start // block_size), stop // block_size
        inner = last - first
        if inner <= 0 or needed_blocks.count(1, first, last) >= WHOLE_SHARE * inner:
            _cover_bytes(needed, start, stop, block_size)
            continue
        begin, end = needed_blocks.find(0, first, last), needed_blocks.rfind(0, first, last) + 1
        if begin - first <= readahead_slack:
            first = begin
        if last - end <= readahead_slack:
            last = end
        needed[first:last] = b"\1" * (last - first)
    for block, need in enumerate(needed):
        if not need:
            needed_blocks[block] = 0


def _cover_bytes(blocks: bytearray, start: int, stop: int, block_size: int) -> None:
    first, last = start // block_size, min(len(blocks), -(-stop // block_size))
    blocks[first:last] = b"\1" * (last - first)
