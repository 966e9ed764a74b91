"""Sets up the kernel after INIT: tries passthrough, sets the read-ahead, has writes refused."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fusecache.config.model import MountConfig
from fusecache.errors import FusecacheError
from fusecache_mount.device.backings import Backings, PassthroughState
from fusecache_mount.kernel import protocol
from fusecache_mount.lifecycle.keeper_link import KeeperLink
from fusecache_mount.lifecycle.keeper_protocol import DaemonMessage, StartMessage
from fusecache_mount.lifecycle.mount_settings import MountSettings

_log = logging.getLogger("fusecache.daemon")


def decide_passthrough(config: MountConfig, start_message: StartMessage) -> PassthroughState:
    """Whether to ask the kernel for passthrough, by the options and by how the mount was made."""
    if config.passthrough == "off":
        return PassthroughState(False, "turned off (passthrough=off)")
    if config.verify == "always":
        return PassthroughState(False, "verify=always: every read is checked by the daemon")
    if not start_message.is_privileged:
        reason = start_message.unprivileged_reason
        return PassthroughState(False, reason or "it needs CAP_SYS_ADMIN: mount as root")
    return PassthroughState(True, "")


class KernelSetup:
    """Sets the kernel up for one mount, once per daemon: after INIT, or at the start where an earlier daemon answered
    INIT. All of it may block on the kernel and on disks, so it runs as a background job (`run_in_background`)."""

    def __init__(
        self,
        keeper_link: KeeperLink,
        mount_settings: MountSettings,
        *,
        store_directories: Sequence[Path],
        passthrough_state: PassthroughState,
        backings: Backings,
        run_in_background: Callable[[Callable[[], None]], None],
    ) -> None:
        self._keeper_link = keeper_link
        self._mount_settings = mount_settings
        self._store_directories = store_directories
        self._passthrough_state = passthrough_state
        self._backings = backings
        self._run_in_background = run_in_background

    def note_answered_init(self, init_request: bytes) -> None:
        """The channel has answered INIT: tell the keeper, for the daemons to come, and begin. Does not block."""
        self._keeper_link.send_message(DaemonMessage(answered_init=init_request))
        self._run_in_background(lambda: self._configure_kernel(init_request))

    def resume(self) -> None:
        """Begin, if an earlier daemon answered INIT. Does not block."""
        init_request = self._keeper_link.answered_init
        if init_request is not None:
            self._run_in_background(lambda: self._configure_kernel(init_request))

    def _configure_kernel(self, init_request: bytes) -> None:
        try:
            self._mount_settings.restore_read_ahead()
        except (OSError, FusecacheError) as error:
            _log.info("the kernel's read-ahead stays as it is: %s", error)
        with contextlib.suppress(OSError):
            self._mount_settings.refuse_writes()  # an earlier daemon may have been killed during a trace of writes
        if self._passthrough_state.is_active:
            self._try_passthrough(init_request)

    def _try_passthrough(self, init_request: bytes) -> None:
        """Try a backing on a file of each directory of the store: not every file system can be one."""
        if not protocol.supports_passthrough(init_request):
            release = os.uname().release
            self._passthrough_state.turn_off(f"kernel {release} can't: it needs Linux 6.9 or newer")
            return
        refusals = [self._backings.find_refusal_reason(directory) for directory in self._store_directories]
        if all(refusals):
            self._passthrough_state.turn_off(refusals[0])
        else:
            self._passthrough_state.confirm("complete files are read by the kernel itself")
            _log.info("passthrough is on")
