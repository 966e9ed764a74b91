"""Serves a mount whose parts are built, until it is unmounted or the daemon makes way for a new version."""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from fusecache.assemble import Node, run_peer_node
from fusecache.control.mounts import SOCKET_NAME
from fusecache.control.server import Handler, serve_requests
from fusecache.telemetry.metrics import StatusCollector
from fusecache.telemetry.server import MetricsServer
from fusecache_mount.device.channel import DeviceChannel
from fusecache_mount.lifecycle.keeper_link import KeeperLink
from fusecache_mount.lifecycle.keeper_protocol import DaemonMessage
from fusecache_mount.lifecycle.kernel_setup import KernelSetup

_log = logging.getLogger("fusecache.daemon")

_MAX_REQUEST_TASKS = 1000
"""Requests, other than READs, under way at once: opens may wait for their file."""


class EndReason(enum.Enum):
    """Why a mount is not served any more."""

    UNMOUNTED = enum.auto()
    """The kernel says so, or the keeper wants the daemon to end."""
    UPGRADE = enum.auto()
    """The keeper will start a new daemon on the same device."""


class MountServer:
    """Runs all tasks of one mount. `handlers` are the operations of the control socket; `build_status` is called from
    threads."""

    def __init__(
        self,
        node: Node,
        keeper_link: KeeperLink,
        *,
        channel: DeviceChannel,
        kernel_setup: KernelSetup,
        handlers: Mapping[str, Handler],
        build_status: Callable[[], Mapping[str, Any]],
        mount_runtime_dir: Path,
    ) -> None:
        self._node = node
        self._keeper_link = keeper_link
        self._channel = channel
        self._kernel_setup = kernel_setup
        self._handlers = handlers
        self._build_status = build_status
        self._mount_runtime_dir = mount_runtime_dir

    async def serve(self) -> EndReason:
        """Serve until the end, and say why it came. The keeper is told when the control socket listens, the node takes
        part in its cluster, and requests of the kernel are about to be answered. Raises ConfigError and MountError."""
        config, reason = self._node.config, EndReason.UNMOUNTED
        with contextlib.ExitStack() as stack:
            if config.metrics_port:
                metrics = MetricsServer(config.metrics_port, StatusCollector(self._build_status))
                stack.callback(metrics.close)
            async with trio.open_nursery() as nursery:

                async def watch_signals() -> None:
                    nonlocal reason
                    with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT) as signals:
                        async for number in signals:
                            if number == signal.SIGUSR1:
                                reason = EndReason.UPGRADE
                            _log.info("ending on %s", signal.Signals(number).name)
                            nursery.cancel_scope.cancel()

                nursery.start_soon(watch_signals)
                await nursery.start(serve_requests, self._mount_runtime_dir / SOCKET_NAME, self._handlers)
                await nursery.start(run_peer_node, self._node)
                nursery.start_soon(
                    functools.partial(
                        trio.to_thread.run_sync,
                        self._channel.start,
                        config.threads,
                        self._keeper_link.answered_init,
                    )
                )
                self._kernel_setup.resume()
                self._keeper_link.send_message(DaemonMessage(is_ready=True))
                _log.info("serving %s", config.mountpoint)
                await pyfuse3.main(max_tasks=_MAX_REQUEST_TASKS)
                nursery.cancel_scope.cancel()
        return reason
