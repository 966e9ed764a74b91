"""Listens to a load and makes a recording of it: what the kernel asked for, in order of the first request. Pure.

Theory of operation. A READ says which blocks somebody will look at, blurred: the kernel reads ahead of a sequential
reader, and around the page of a fault. So READs are taken down in runs, each a stretch of a file that grew in place,
and at the end the tensors (formats.py) say what the reader was after: blocks at the edge of a tensor, no more than the
kernel may have asked for on its own, are left out when the rest of that tensor was not read.

Ranks read at the same time. A run that another process's READs come between is ended after RUN_LIMIT blocks, so that
the recording alternates between the ranks as they did.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence

from fusecache.loader.formats import Layout
from fusecache.loader.recording import Recording, Run

RUN_LIMIT = 16
"""Blocks: about what one flight brings."""
MOST_RANKS = 255
ALL_OF_IT = 0.9
"""Share of a tensor, or a file, from which on it counts as read whole: the page cache answers some reads by itself."""
LEAST = 0.05
"""Share of the model below which it was looked at, and not loaded."""

_NEAR = 8
"""Blocks by which READs of one reader come out of order: they are taken up by several threads."""
_OPEN_RUNS = 4
"""Readers of one file at the same time, as far as they are told apart."""


class _File:
    """What was asked for of one file. `run` is, per block, the number of its run, 0: none."""

    def __init__(self, blocks: int) -> None:
        self.asked = bytearray(blocks)
        self.run = array("I", bytes(4 * blocks))
        self.growing: list[_Growing] = []
        self.whole = False


class _Growing:
    """A run that may still grow."""

    def __init__(self, number: int, start: int, stop: int) -> None:
        self.number = number
        self.start = start
        self.stop = stop
        self.since = 0


class Recorder:
    """Takes down one load of the model `model`, whose files have `counts` blocks. Thread-safe; its lock is a leaf.

    `ahead` is how much the kernel reads ahead, in bytes.
    """

    def __init__(self, model: str, block_size: int, counts: Sequence[int], ahead: int) -> None:
        self._model = model
        self._block_size = block_size
        self._counts = tuple(counts)
        self._edge = -(-2 * ahead // block_size) + 1
        self._files: dict[int, _File] = {}
        self._runs: list[tuple[int, int]] = []
        """(file, rank) of each run, in order."""
        self._ranks: dict[int, int] = {}
        self._lock = threading.Lock()

    def opened(self, file: int, *, whole: bool = False) -> None:
        """A file was opened; `whole`: its reads will not be heard of, the kernel answers them."""
        with self._lock:
            found = self._file(file)
            if whole and not found.whole:
                found.whole = True
                if 0 in found.asked:
                    self._begin(found, file, 0, self._counts[file], 0)

    def asked(self, file: int, start: int, stop: int, process: int) -> None:
        """A READ of the blocks [start, stop) came from this process."""
        found = self._files.get(file)
        if found is not None and found.asked.find(0, start, stop) < 0:
            return  # without the lock: blocks that were asked for stay so
        with self._lock:
            found = self._file(file)
            first = found.asked.find(0, start, stop)
            while first >= 0:
                last = found.asked.find(1, first, stop)
                last = stop if last < 0 else last
                self._add(found, file, first, last, process)
                first = found.asked.find(0, last, stop)

    def _file(self, file: int) -> _File:
        found = self._files.get(file)
        if found is None:
            found = self._files[file] = _File(self._counts[file])
        return found

    def _add(self, found: _File, file: int, start: int, stop: int, process: int) -> None:
        rank = self._ranks.get(process)
        if rank is None:
            rank = self._ranks[process] = min(len(self._ranks), MOST_RANKS)
        newest = len(self._runs)
        for run in found.growing:
            near = run.start - _NEAR <= start and stop <= run.stop + _NEAR + (stop - start)
            alone = run.number == newest
            if near and (alone or run.stop - run.start - run.since < RUN_LIMIT):
                if alone:
                    run.since = run.stop - run.start
                run.start, run.stop = min(run.start, start), max(run.stop, stop)
                self._mark(found, start, stop, run.number)
                return
        self._begin(found, file, start, stop, rank)

    def _begin(self, found: _File, file: int, start: int, stop: int, rank: int) -> None:
        self._runs.append((file, rank))
        number = len(self._runs)
        found.growing = [_Growing(number, start, stop), *found.growing[: _OPEN_RUNS - 1]]
        self._mark(found, start, stop, number)

    def _mark(self, found: _File, start: int, stop: int, number: int) -> None:
        for block in range(start, stop):
            if not found.asked[block]:
                found.run[block] = number
        found.asked[start:stop] = b"\1" * (stop - start)

    def finish(self, layouts: Mapping[int, Layout]) -> Recording | None:
        """What was heard so far; None: too little to be a load. Where not all files were opened, the load may have
        been broken off, and those that were count as read whole."""
        with self._lock:
            complete = len(self._files) == len(self._counts)
            kept: dict[int, bytearray] = {}
            for file, found in self._files.items():
                wanted = bytearray(found.asked)
                if not found.whole and file in layouts:
                    leave_out_edges(wanted, layouts[file], self._block_size, self._edge)
                if found.whole or not complete or wanted.count(1) >= ALL_OF_IT * len(wanted):
                    wanted = bytearray(b"\1" * len(wanted))
                kept[file] = wanted
            if sum(wanted.count(1) for wanted in kept.values()) < LEAST * sum(self._counts):
                return None
            return Recording(self._model, self._block_size, tuple(self._collect(kept)))

    def _collect(self, kept: Mapping[int, bytearray]) -> list[Run]:
        parts: dict[int, list[Run]] = {}
        late: list[Run] = []
        for file, wanted in kept.items():
            numbers = self._files[file].run
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
                            Run(file, start, block, self._runs[number - 1][1])
                        )
                    else:
                        late.append(Run(file, start, block))
                start = block
        return [run for number in sorted(parts) for run in parts[number]] + late


def leave_out_edges(wanted: bytearray, layout: Layout, block_size: int, edge: int) -> None:
    """Take away the blocks that were asked for only because they lie beside what a reader was after: at most `edge`
    blocks at either end of a tensor that was not read, in blocks that hold no other one."""
    needed = bytearray(len(wanted))
    for start, stop in layout.head:
        _cover(needed, start, stop, block_size)
    for start, stop in layout.tensors:
        first, last = -(-start // block_size), stop // block_size
        inner = last - first
        if inner <= 0 or wanted.count(1, first, last) >= ALL_OF_IT * inner:
            _cover(needed, start, stop, block_size)
            continue
        begin, end = wanted.find(0, first, last), wanted.rfind(0, first, last) + 1
        if begin - first <= edge:
            first = begin
        if last - end <= edge:
            last = end
        needed[first:last] = b"\1" * (last - first)
    for block, need in enumerate(needed):
        if not need:
            wanted[block] = 0


def _cover(blocks: bytearray, start: int, stop: int, block_size: int) -> None:
    first, last = start // block_size, min(len(blocks), -(-stop // block_size))
    blocks[first:last] = b"\1" * (last - first)
