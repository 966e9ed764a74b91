"""Notifications: the daemon tells the kernel something that it was not asked, by a write to the device."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Sequence

from fusecache_mount.device.init_exchange import InitExchange
from fusecache_mount.kernel import protocol

_log = logging.getLogger(__name__)


class KernelNotifier:
    """Writes notifications to `device_fd`. Thread-safe; holds no state."""

    def __init__(self, device_fd: int, init_exchange: InitExchange) -> None:
        self._device_fd = device_fd
        self._init_exchange = init_exchange

    def request_resend(self) -> None:
        """Have the kernel send again what an earlier daemon left unanswered, if it can."""
        if self._init_exchange.supports_resend:
            with contextlib.suppress(OSError):
                os.write(self._device_fd, protocol.resend_notification())

    def invalidate_entries(self, names: Sequence[tuple[int, bytes]]) -> None:
        """Make the kernel forget what these (directory, name) are. Blocks until the kernel has each directory's lock:
        never call it while a request of that directory waits for the caller."""
        for parent, name in names:
            try:
                os.write(self._device_fd, protocol.inval_entry_notification(parent, name))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV):
                    _log.debug("notify: %s", error)

    @property
    def supports_expire(self) -> bool:
        """Whether the kernel can do what `expire_entries` asks for."""
        return self._init_exchange.supports_expire

    def expire_entries(self, names: Sequence[tuple[int, bytes]], deadline: float) -> int:
        """Have the kernel look these (directory, name) up again at their next use. Blocks while a directory is locked
        by a request; stops at `deadline`, a time.monotonic(). Returns how many it did not come to."""
        for done, (parent, name) in enumerate(names):
            if time.monotonic() > deadline:
                return len(names) - done
            with contextlib.suppress(OSError):  # ENOENT: the kernel does not know it (any more)
                os.write(self._device_fd, protocol.inval_entry_notification(parent, name, expire_only=True))
        return 0
