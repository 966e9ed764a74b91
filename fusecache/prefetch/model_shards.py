"""A model as far as it is known: its files, where their tensors lie, in which order they were read. Plain data.

The scheduling lock guards all of it, but for the recorder, which guards itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusecache.blocks import block_count
from fusecache.fetch.ordered_runs import OrderedRuns
from fusecache.prefetch.models.tensor_formats import TensorLayout
from fusecache.prefetch.profiles.access_profile import MAX_FILES, AccessProfile, id_of_model
from fusecache.prefetch.profiles.recorder import ProfileRecorder, readahead_slack
from fusecache.types import ObjectVersion

MIN_MODEL_BLOCKS = 64
"""Blocks of a model below which its order does not matter: an adapter, say, is there in a moment."""
CLOSED_SECONDS = 3.0
"""Seconds without an open file after which a load is over; between two shards engines close the one they read."""
SILENT_SECONDS = 60.0
"""Seconds without a read after which a load is over though files are open: some engines keep them mapped."""


@dataclass
class LoadSession:
    """One load of a model, from the first open of a file until no program reads any more."""

    recorder: ProfileRecorder | None
    last_activity_at: float
    """When something was opened, read or closed, as a time.monotonic()."""
    open_files: int = 0
    """Files that are open."""
    has_opened_file: bool = False
    """A file was opened; before that, the model was only announced."""
    is_cold: bool = False
    """A file was opened that was not whole."""
    is_planned: bool = False
    """The task that studies it is queued, or was."""
    is_studied: bool = False
    """It is known what the profile says, or that there is none."""
    has_asked_peers: bool = False
    plan_after: tuple[ObjectVersion, str] | None = None
    """The file, and its source, behind which the others are fetched if there is no profile."""
    is_profile_wrong: bool = False
    """The profile that was followed does not fit this load."""
    ordered_runs: OrderedRuns | None = None

    def is_over(self, now: float) -> bool:
        """Whether it ended, if no reader waits for a block."""
        return now - self.last_activity_at > (
            SILENT_SECONDS if self.open_files or not self.has_opened_file else CLOSED_SECONDS
        )


@dataclass
class ModelShards:
    """The shards of one model in one folder; `versions` are in the order of their keys. The kernel reads
    `readahead_bytes` ahead of their readers."""

    source: str
    versions: tuple[ObjectVersion, ...]
    block_size: int
    readahead_bytes: int
    learns_order: bool
    id: str = ""
    block_counts: tuple[int, ...] = ()
    profile: AccessProfile | None = None
    """The reads of an earlier load."""
    needed_blocks: tuple[bytearray, ...] | None = None
    """Per file a 1 for each block that the profile names; None: it leaves out none."""
    stray_counts: Counter[int] = field(default_factory=Counter)
    """Per file, the blocks that were read in this session though they are far from all that the profile names."""
    headers_fetched_at: float = -math.inf
    """When the headers were last asked for."""
    found_whole_at: float = -math.inf
    """When all files were last found complete in the store."""
    session: LoadSession | None = None
    recorder: ProfileRecorder | None = None
    """That of the session, for readers, which take no lock."""
    last_read_at: float = 0.0
    """When a reader asked for something; written without the lock."""
    layouts: dict[int, TensorLayout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = id_of_model(self.versions)
        self.block_counts = tuple(block_count(version.size, self.block_size) for version in self.versions)

    @property
    def readahead_slack(self) -> int:
        """Blocks by which the kernel may ask for more than a reader is after."""
        return readahead_slack(self.readahead_bytes, self.block_size)

    @property
    def is_learning(self) -> bool:
        """Whether there is no profile yet, and reads are recorded to make one."""
        return self.learns_order and self.profile is None

    def prefetch_mask_of(self, file: int) -> bytearray | None:
        """The blocks of a file that the profile names; None: it names all, or is not followed in this session."""
        if self.needed_blocks is None or (self.session is not None and self.session.is_profile_wrong):
            return None
        found = self.needed_blocks[file]
        return None if 0 not in found else bytearray(found)

    def adopt_profile(self, profile: AccessProfile) -> bool:
        """Follow this profile from now on; returns False, and does nothing, if it is not one of this model."""
        if not profile.matches_model(self.id, self.block_size, self.block_counts):
            return False
        needed = tuple(bytearray(count) for count in self.block_counts)
        for run in profile.runs:
            needed[run.file][run.start : run.stop] = b"\1" * (run.stop - run.start)
        # a file that is not in it at all was not opened, which says nothing of the next load, unless in those that
        # were blocks were left out: then all were opened (ProfileRecorder.make_profile sees to that)
        self.profile = profile
        self.needed_blocks = needed if any(0 in mask and 1 in mask for mask in needed) else None
        return True


def is_worth_learning(versions: Sequence[ObjectVersion], block_size: int) -> bool:
    """Whether to learn how these files are read."""
    blocks = sum(block_count(version.size, block_size) for version in versions)
    return blocks >= MIN_MODEL_BLOCKS and len(versions) <= MAX_FILES
