"""Layout of a nodeid, the 64-bit number that the kernel names an inode with.

Bits 0-61 are the inode number (st_ino) that the catalog gave the path and version. Bit 62 marks the passthrough
nodeid: the kernel refuses passthrough on an inode that has cached opens, so a file that becomes complete gets a second
nodeid beside its base, while st_ino stays the same. Bit 63 stays clear: some programs read st_ino as a signed number.
Pure, and the standard library only.
"""

from __future__ import annotations

PASSTHROUGH_BIT = 1 << 62


def passthrough_nodeid(nodeid: int) -> int:
    """The nodeid that passthrough opens of this inode use."""
    return nodeid | PASSTHROUGH_BIT


def inode_number(nodeid: int) -> int:
    """The st_ino behind either nodeid of a file."""
    return nodeid & ~PASSTHROUGH_BIT


def is_passthrough(nodeid: int) -> bool:
    """Whether this is the passthrough nodeid of a file, and not its base."""
    return bool(nodeid & PASSTHROUGH_BIT)
