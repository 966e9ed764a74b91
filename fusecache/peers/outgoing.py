"""How much this node still has to send."""

from __future__ import annotations

import threading


class OutgoingBytes:
    """The bytes that this node has promised to other nodes and not sent yet. Thread-safe: `_lock` guards the sum and is
    a leaf. The service that answers other nodes counts here; every request of this node's own tells the sum."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unsent_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        """The sum now."""
        return self._unsent_bytes

    def promise(self, nbytes: int) -> None:
        """A response of so many bytes begins."""
        with self._lock:
            self._unsent_bytes += nbytes

    def settle(self, nbytes: int) -> None:
        """So many of the promised bytes were sent, or will not be sent any more."""
        with self._lock:
            self._unsent_bytes -= nbytes
