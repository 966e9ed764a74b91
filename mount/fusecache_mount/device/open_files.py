"""The open files of a mount, as the channel and the FUSE operations need them."""

from __future__ import annotations

from typing import Protocol

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.types import ObjectVersion


class OpenFiles(Protocol):
    """The open files. Thread-safe, but for the coroutines and `record_stale_answer`, which are of the event loop."""

    # -- for the channel's threads

    def get_object_fetch(self, nodeid: int) -> ObjectFetch:
        """The fetch behind a nodeid that is open. May block on the disk once per nodeid. Raises FusecacheError."""

    def open_passthrough(self, nodeid: int) -> int:
        """Open a passthrough nodeid once more, if that is all there is to do; returns its backing, or 0: nothing was
        opened, and the request is pyfuse3's. May block on the store's disk."""

    def open_answered(self, nodeid: int) -> None:
        """The reply to an `open_passthrough` is on its way: do what the open need not wait for. Does not block."""

    def backing_id(self, nodeid: int) -> int:
        """The passthrough backing of this nodeid, 0 for none."""

    def is_awaiting_attestation(self, nodeid: int) -> bool:
        """Whether opens of this nodeid wait until somebody vouches for the file, which may take as long as a fetch."""

    def release(self, nodeid: int) -> None:
        """One open less: it was closed, or never reached the kernel. Does not block."""

    # -- for the operations

    def resolves_to_passthrough(self, version: ObjectVersion) -> bool:
        """Whether LOOKUP of a file of this version leads to its passthrough nodeid."""

    async def open(self, nodeid: int, tid: int) -> None:
        """Open either nodeid of a file, for this thread. Raises FusecacheError."""

    def record_stale_answer(self, path: str | None, tid: int) -> None:
        """This thread's open of this path (None: it is not known) is answered ESTALE: the VFS comes back once, and only
        once."""

    async def read(self, nodeid: int, offset: int, size: int) -> bytes:
        """Bytes for a READ that the channel did not answer. Raises FusecacheError."""

    def cached_bytes(self, nodeid: int, version: ObjectVersion) -> int:
        """Bytes in the store of the file with this base nodeid and version. May block on the disk."""

    def cache_usage(self) -> tuple[int, int]:
        """Bytes used, and the limit, of the cache. May block on the disk."""
