"""A recording: in which order a load read the blocks of a model's files. Pure; the one place that knows its bytes.

Format 1, little-endian: "FCORDER1", the model's id (16 bytes), the block size (4 bytes), the number of runs (4 bytes),
the runs, xxh3_64 of all that (8 bytes). A run is four varints: the file, and the start behind the end of the run
before it, both as zigzag differences, the number of blocks, the rank. The file is an index into the model's files,
sorted by key. Recordings come from other machines, too: nothing in them is believed before `unpack` and `fits`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from fusecache.types import ObjectVersion

MAX_BYTES = 64 << 10
MAX_RUNS = 12_000
"""Five bytes a run, at most, for any model that is: with more of them the order is told more coarsely."""
MAX_FILES = 4096

_MAGIC = b"FCORDER1"
_HEAD = struct.Struct("<8s16sII")
_SUM = struct.Struct("<Q")
_MOST = 1 << 40


class RecordingError(Exception):
    """These bytes are not a recording of this format, or are damaged."""


@dataclass(frozen=True)
class Run:
    """Blocks [start, stop) of a file, read one after the other by one process, the `rank`th that was seen."""

    file: int
    start: int
    stop: int
    rank: int = 0


@dataclass(frozen=True)
class Recording:
    """`model` is what `model_id` gives for the files. The blocks of a run may be in another one, too."""

    model: str
    block_size: int
    runs: tuple[Run, ...]

    @property
    def ranks(self) -> int:
        """How many processes read."""
        return len({run.rank for run in self.runs})

    @property
    def blocks(self) -> int:
        """How many blocks were read."""
        return sum(run.stop - run.start for run in self.runs)

    def files(self) -> list[int]:
        """The files, in the order in which they were first read."""
        return list(dict.fromkeys(run.file for run in self.runs))

    def of(self, file: int) -> list[range]:
        """What was read of one file, in order."""
        return [range(run.start, run.stop) for run in self.runs if run.file == file]

    def fits(self, model: str, block_size: int, counts: Sequence[int]) -> bool:
        """Whether it is one of this model, whose files have so many blocks."""
        return (self.model, self.block_size) == (model, block_size) and all(
            run.file < len(counts) and run.stop <= counts[run.file] for run in self.runs
        )


def model_id(versions: Iterable[ObjectVersion]) -> str:
    """32 hex digits that name this set of file versions, whatever their order: any other set has another one."""
    ids = sorted(version.id for version in versions)
    return xxhash.xxh3_128_hexdigest("\0".join(ids).encode())


def pack(recording: Recording) -> bytes:
    """Its bytes, at most MAX_BYTES: the order within what is read at about the same time is given up first."""
    runs: Sequence[Run] = recording.runs
    window = 2
    while True:
        if len(runs) <= MAX_RUNS:
            data = _pack(recording, runs)
            if len(data) <= MAX_BYTES:
                return data
        runs = _coarser(recording.runs, window)
        window *= 2


def _pack(recording: Recording, runs: Sequence[Run]) -> bytes:
    head = _HEAD.pack(_MAGIC, bytes.fromhex(recording.model), recording.block_size, len(runs))
    body = bytearray(head)
    file = at = 0
    for run in runs:
        for value in (_zigzag(run.file - file), _zigzag(run.start - at), run.stop - run.start, run.rank):
            _put(body, value)
        file, at = run.file, run.stop
    return bytes(body) + _SUM.pack(xxhash.xxh3_64_intdigest(bytes(body)))


def _coarser(runs: Sequence[Run], window: int) -> list[Run]:
    """Runs of the same file among `window` successive ones, sorted, and joined where no more than window / 16 blocks
    lie between them (which were not read, and will be fetched all the same)."""
    found: list[Run] = []
    for first in range(0, len(runs), window):
        for run in sorted(runs[first : first + window], key=lambda run: (run.file, run.start)):
            last = found[-1] if found else None
            if last is not None and last.file == run.file and 0 <= run.start - last.stop <= window // 16:
                found[-1] = Run(run.file, last.start, run.stop, last.rank)
            else:
                found.append(run)
    return found


def unpack(data: bytes) -> Recording:
    """The recording in these bytes. Raises RecordingError."""
    if not _HEAD.size + _SUM.size <= len(data) <= MAX_BYTES:
        raise RecordingError("not a recording: its length")
    magic, model, block_size, count = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise RecordingError("not a recording of this version of fusecache")
    body = memoryview(data)[: -_SUM.size]
    if _SUM.unpack_from(data, len(body))[0] != xxhash.xxh3_64_intdigest(body):
        raise RecordingError("damaged: its checksum is wrong")
    if count > MAX_RUNS:
        raise RecordingError("more runs than can be")
    runs, at = [], _HEAD.size
    file = block = 0
    for _ in range(count):
        values = []
        for _ in range(4):
            value, at = _get(body, at)
            values.append(value)
        file += _unzigzag(values[0])
        start = block + _unzigzag(values[1])
        stop = start + values[2]
        if not (0 <= file < MAX_FILES and 0 <= start < stop <= _MOST):
            raise RecordingError("a run that can't be")
        runs.append(Run(file, start, stop, values[3]))
        block = stop
    if at != len(body):
        raise RecordingError("bytes behind the last run")
    return Recording(model.hex(), block_size, tuple(runs))


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _unzigzag(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value + 1) // 2


def _put(into: bytearray, value: int) -> None:
    while value >= 0x80:
        into.append(value & 0x7F | 0x80)
        value >>= 7
    into.append(value)


def _get(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 42:
            raise RecordingError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
