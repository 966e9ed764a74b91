"""What the loader knows of a model: its files, where their tensors lie, in which order they were read. Plain data.

All of it is guarded by the loader's lock, but for the recorder, which guards itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusecache.blocks import block_count
from fusecache.loader.formats import Layout
from fusecache.loader.recorder import Recorder
from fusecache.loader.recording import MAX_FILES, Recording, model_id
from fusecache.loader.replay import Replay
from fusecache.types import ObjectId, ObjectVersion

LEAST_BLOCKS = 64
"""Blocks of a model below which its order does not matter: an adapter, say, is there in a moment."""
CLOSED_FOR = 3.0
"""Seconds without an open file after which a load is over; between two shards engines close the one they read."""
SILENT_FOR = 60.0
"""Seconds without a read after which a load is over though files are open: some engines keep them mapped."""


@dataclass
class Session:
    """One load of a model, from the first open of a file to when nobody reads any more."""

    recorder: Recorder | None
    last: float
    """When something was opened, read or closed, as a time.monotonic()."""
    readers: int = 0
    """Files that are open."""
    entered: bool = False
    """A file was opened; before that, the model was only announced."""
    cold: bool = False
    """A file was opened that was not whole."""
    planned: bool = False
    """Its task is under way; `studied`: and told what it found out."""
    studied: bool = False
    asked_others: bool = False
    behind: tuple[ObjectVersion, str] | None = None
    """The file, and its source, behind which the others are fetched if there is no recording."""
    wrong: bool = False
    """The recording that was followed does not fit this load."""
    replay: Replay | None = None

    def over(self, now: float) -> bool:
        """Whether it ended, if nobody waits for a block."""
        return now - self.last > (SILENT_FOR if self.readers or not self.entered else CLOSED_FOR)


@dataclass
class Model:
    """The shards of one model in one folder; `versions` are in the order of their keys. `ahead` is how far the kernel
    reads ahead of who reads them, in bytes."""

    source: str
    versions: tuple[ObjectVersion, ...]
    block_size: int
    ahead: int
    learns: bool
    id: str = ""
    counts: tuple[int, ...] = ()
    recording: Recording | None = None
    """What an earlier load did; `marks` are the blocks of each file that it names, if it leaves out any."""
    marks: tuple[bytearray, ...] | None = None
    heads_at: float = -math.inf
    """When the headers were last asked for; `here_at`: when all files were last found whole in the store."""
    here_at: float = -math.inf
    session: Session | None = None
    recorder: Recorder | None = None
    """That of the session, for who has no lock; so is `heard`: when a reader asked for something."""
    heard: float = 0.0
    layouts: dict[int, Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = model_id(self.versions)
        self.counts = tuple(block_count(version.size, self.block_size) for version in self.versions)
        self._numbers = {version.id: number for number, version in enumerate(self.versions)}

    @property
    def edge(self) -> int:
        """Blocks by which the kernel may ask for more than a reader is after."""
        return -(-2 * self.ahead // self.block_size) + 1

    @property
    def learning(self) -> bool:
        """Whether there is nothing to follow yet, and readers are listened to."""
        return self.learns and self.recording is None

    def number(self, object_id: ObjectId) -> int:
        """Of this file in a recording. Raises KeyError."""
        return self._numbers[object_id]

    def wanted(self, file: int) -> bytearray | None:
        """The blocks of a file that the recording names; None: all of it, or it is not followed."""
        if self.marks is None or (self.session is not None and self.session.wrong):
            return None
        found = self.marks[file]
        return None if 0 not in found else bytearray(found)

    def take(self, recording: Recording) -> bool:
        """Follow this one from now on, if it is one of this model."""
        if not recording.fits(self.id, self.block_size, self.counts):
            return False
        marks = tuple(bytearray(count) for count in self.counts)
        for run in recording.runs:
            marks[run.file][run.start : run.stop] = b"\1" * (run.stop - run.start)
        # a file that is not in it at all was not opened, which says nothing of the next load, unless in those that
        # were blocks were left out: then all were opened (see Recorder.finish)
        self.recording = recording
        self.marks = marks if any(0 in mark and 1 in mark for mark in marks) else None
        return True


def worth_it(versions: Sequence[ObjectVersion], block_size: int) -> bool:
    """Whether to learn how these files are read."""
    blocks = sum(block_count(version.size, block_size) for version in versions)
    return blocks >= LEAST_BLOCKS and len(versions) <= MAX_FILES
