"""An access profile: in which order a load read the blocks of a model's files. Pure; the one place that knows its
bytes.

Format 1, little-endian: "FCORDER1", the model's id (16 bytes), the block size (4 bytes), the number of runs (4 bytes),
the runs, xxh3_64 of all that (8 bytes). A run is four varints: the file, and the start behind the end of the run
before it, both as zigzag differences, the number of blocks, the rank. The file is an index into the model's files,
sorted by key. Profiles come from other machines, too: nothing in them is believed before
`unpack_profile` and `matches_model`.
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
_HEADER = struct.Struct("<8s16sII")
_CHECKSUM = struct.Struct("<Q")
_MAX_BLOCK = 1 << 40


class ProfileError(Exception):
    """These bytes are not a profile of this format, or are damaged."""


@dataclass(frozen=True)
class ProfileRun:
    """Blocks [start, stop) of a file, read one after the other by one process, the `rank`th that was seen."""

    file: int
    start: int
    stop: int
    rank: int = 0


@dataclass(frozen=True)
class AccessProfile:
    """`model_id` is the `id_of_model` of the files. The blocks of a run may be in another one, too."""

    model_id: str
    block_size: int
    runs: tuple[ProfileRun, ...]

    @property
    def rank_count(self) -> int:
        """How many processes read."""
        return len({run.rank for run in self.runs})

    @property
    def block_count(self) -> int:
        """How many blocks were read."""
        return sum(run.stop - run.start for run in self.runs)

    def file_order(self) -> list[int]:
        """The files, in the order in which they were first read."""
        return list(dict.fromkeys(run.file for run in self.runs))

    def ranges_of_file(self, file: int) -> list[range]:
        """The blocks of one file that were read, in order."""
        return [range(run.start, run.stop) for run in self.runs if run.file == file]

    def matches_model(self, model_id: str, block_size: int, block_counts: Sequence[int]) -> bool:
        """Whether it is one of this model, whose files have so many blocks."""
        return (self.model_id, self.block_size) == (model_id, block_size) and all(
            run.file < len(block_counts) and run.stop <= block_counts[run.file] for run in self.runs
        )


def id_of_model(versions: Iterable[ObjectVersion]) -> str:
    """32 hex digits that name this set of file versions, in any order: another set has other digits."""
    ids = sorted(version.id for version in versions)
    return xxhash.xxh3_128_hexdigest("\0".join(ids).encode())


def pack_profile(profile: AccessProfile) -> bytes:
    """Its bytes, at most MAX_BYTES: the order of blocks that are read at about the same time is given up first."""
    runs: Sequence[ProfileRun] = profile.runs
    window = 2
    while True:
        if len(runs) <= MAX_RUNS:
            data = _pack_runs(profile, runs)
            if len(data) <= MAX_BYTES:
                return data
        runs = _coarsen_runs(profile.runs, window)
        window *= 2


def _pack_runs(profile: AccessProfile, runs: Sequence[ProfileRun]) -> bytes:
    head = _HEADER.pack(_MAGIC, bytes.fromhex(profile.model_id), profile.block_size, len(runs))
    body = bytearray(head)
    file = at = 0
    for run in runs:
        for value in (_zigzag(run.file - file), _zigzag(run.start - at), run.stop - run.start, run.rank):
            _append_varint(body, value)
        file, at = run.file, run.stop
    return bytes(body) + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(bytes(body)))


def _coarsen_runs(runs: Sequence[ProfileRun], window: int) -> list[ProfileRun]:
    """Runs of the same file among `window` successive ones, sorted, and joined where no more than window / 16 blocks
    lie between them (which were not read, and will be fetched all the same)."""
    found: list[ProfileRun] = []
    for first in range(0, len(runs), window):
        for run in sorted(runs[first : first + window], key=lambda run: (run.file, run.start)):
            last = found[-1] if found else None
            if last is not None and last.file == run.file and 0 <= run.start - last.stop <= window // 16:
                found[-1] = ProfileRun(run.file, last.start, run.stop, last.rank)
            else:
                found.append(run)
    return found


def unpack_profile(data: bytes) -> AccessProfile:
    """The recording in these bytes. Raises ProfileError."""
    if not _HEADER.size + _CHECKSUM.size <= len(data) <= MAX_BYTES:
        raise ProfileError("not a recording: its length")
    magic, model, block_size, count = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ProfileError("not a recording of this version of fusecache")
    body = memoryview(data)[: -_CHECKSUM.size]
    if _CHECKSUM.unpack_from(data, len(body))[0] != xxhash.xxh3_64_intdigest(body):
        raise ProfileError("damaged: its checksum is wrong")
    if count > MAX_RUNS:
        raise ProfileError("more runs than can be")
    runs, at = [], _HEADER.size
    file = block = 0
    for _ in range(count):
        values = []
        for _ in range(4):
            value, at = _read_varint(body, at)
            values.append(value)
        file += _unzigzag(values[0])
        start = block + _unzigzag(values[1])
        stop = start + values[2]
        if not (0 <= file < MAX_FILES and 0 <= start < stop <= _MAX_BLOCK):
            raise ProfileError("a run that can't be")
        runs.append(ProfileRun(file, start, stop, values[3]))
        block = stop
    if at != len(body):
        raise ProfileError("bytes behind the last run")
    return AccessProfile(model.hex(), block_size, tuple(runs))


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _unzigzag(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value + 1) // 2


def _append_varint(into: bytearray, value: int) -> None:
    while value >= 0x80:
        into.append(value & 0x7F | 0x80)
        value >>= 7
    into.append(value)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 42:
            raise ProfileError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def check_profile(data: bytes, model_id: str) -> str:
    """Why these bytes are not a profile of the model; "": they are one."""
    try:
        found = unpack_profile(data)
    except ProfileError as error:
        return str(error)
    return "" if found.model_id == model_id else "it is another model's"
