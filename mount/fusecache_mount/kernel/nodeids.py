"""Layout of a nodeid, the 64-bit number that the kernel names an inode with.

Bits 0-61 are the inode number (st_ino) that the catalog gave the path and version. Bit 62 marks the twin
that is opened with FUSE passthrough: the kernel refuses passthrough on an inode that has cached opens, so a
file that becomes complete gets a second nodeid, while st_ino stays the same. Bit 63 stays clear: some programs
read st_ino as a signed number.
"""

from __future__ import annotations

from fusecache.types import NodeId

ROOT = NodeId(1)
PASSTHROUGH_BIT = 1 << 62


def passthrough_nodeid(nodeid: int) -> NodeId:
    """The nodeid that passthrough opens of this inode use."""
    return NodeId(nodeid | PASSTHROUGH_BIT)


def inode_number(nodeid: int) -> NodeId:
    """The st_ino behind either twin."""
    return NodeId(nodeid & ~PASSTHROUGH_BIT)


def is_passthrough(nodeid: int) -> bool:
    """Whether this nodeid is the passthrough twin."""
    return bool(nodeid & PASSTHROUGH_BIT)
