"""Which blocks of one object version are there, and which of them this process may serve."""

from __future__ import annotations

from fusecache.blocks import block_count
from fusecache.locking import OwnedLock


class BlockMap:
    """The blocks of one open object version.

    There are two layers of knowledge: the checksums in the .blocks file, which all processes share through the page
    cache (a block with a checksum is in the data file), and a byte per block that says whether this process wrote or
    hashed the block itself. Only blocks of the second kind are ever served.

    | State of a block | Checksum | Byte | How it gets there |
    |---|---|---|---|
    | absent | 0 | 0 | nothing was written yet; or the block was found bad, and its checksum was cleared |
    | reserved | 0 | 0 | ObjectWriter.reserve_bytes has counted its space in the ledger |
    | written | 0 | 0 | ObjectWriter.write has put its bytes into the data file; a crash makes it absent |
    | present | set | 1 | ObjectWriter.commit_block; verify_block found it right; or it is known from before |
    | unverified | set | 0 | another process committed it, or an earlier one; verify_block decides |
    | bad | set | 0 | its bytes do not match, and the file can't be mended, since another process has it open |

    Questions take no lock: a byte goes from 0 to 1 once, and back only when its block is found bad. The lock of the
    object (FilesHolder) guards the changes, whose names end in `_locked`.
    """

    def __init__(self, size: int, block_size: int, lock: OwnedLock) -> None:
        self.block_count = block_count(size, block_size)
        self.missing_block_count = self.block_count
        """Blocks that are not present."""
        self.is_complete = self.block_count == 0
        """Every block is present. A plain attribute, since it is read for each READ."""
        self.bad_block_count = 0
        """Blocks that were found bad since the object was opened."""
        self._lock = lock
        self.verified = bytearray(self.block_count)
        """A byte per block: 1 if it is present. Others read it, and change nothing."""
        self._checksums: memoryview | None = None
        """Live: other processes' blocks appear here. None: there are no files."""
        self._bad_blocks: set[int] = set()

    # -- questions

    def is_unverified(self, block: int) -> bool:
        """Whether the block is in the data file, and this process has yet to verify it."""
        checksums = self._checksums
        if checksums is None or self.verified[block] or checksums[block] == 0:
            return False
        return block not in self._bad_blocks

    def checksum(self, block: int) -> int:
        """The checksum of a block in the data file, 0 for none."""
        checksums = self._checksums
        return 0 if checksums is None else checksums[block]

    def marked_blocks(self) -> bytes:
        """A byte per block: 1 if it has a checksum, so is in the data file."""
        return bytes(self.block_count) if self._checksums is None else bytes(map(bool, self._checksums))

    # -- changes

    def adopt_locked(self, checksums: memoryview, verified: bytes | bytearray | None) -> None:
        """The files were opened or made: `checksums` are theirs, and `verified` has a 1 for each block that is known
        to be good, if any is."""
        self._lock.assert_held()
        if verified is not None:
            self.verified[:] = verified
        self.missing_block_count = self.verified.count(0)
        self._checksums = checksums
        self.is_complete = self.missing_block_count == 0

    def detach_locked(self) -> None:
        """The files are closed: no block is in them any more, as far as this object can tell."""
        self._lock.assert_held()
        self._checksums = None

    def mark_present_locked(self, block: int) -> None:
        """This process wrote the block or found its checksum right: it becomes present."""
        self._lock.assert_held()
        if not self.verified[block]:
            self.verified[block] = 1
            self.missing_block_count -= 1
            if self.missing_block_count == 0:
                self.is_complete = True

    def mark_bad_locked(self, block: int) -> None:
        """The block was found bad: it is not present any more, and is counted."""
        self._lock.assert_held()
        self.bad_block_count += 1
        if self.verified[block]:
            self.verified[block] = 0
            self.missing_block_count += 1
            self.is_complete = False

    def reject_locked(self, block: int) -> None:
        """The bad block keeps its checksum in a file that was given up: it is not to be verified again."""
        self._lock.assert_held()
        self._bad_blocks.add(block)
