"""The daemon: builds the parts of one mount and serves it until it is unmounted.

The keeper starts it as `python -m fusecache_mount.lifecycle.daemon --device FD --clones FD,FD --keeper FD --config FD`,
and they talk over the `--keeper` socket (keeper_protocol.py). The daemon ends with 0 after an unmount, with
EXIT_UPGRADE when it makes way for a new version of itself, and with 1 when it can't start."""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from fusecache.assemble import Node, build_node
from fusecache.config.model import MountConfig
from fusecache.control.mounts import make_mount_runtime_dir
from fusecache.errors import FusecacheError, first_error
from fusecache.prefetch.models.shard_order import is_shard
from fusecache.telemetry.logs import configure_logging
from fusecache_mount.device.backings import Backings
from fusecache_mount.device.channel import DeviceChannel, build_channel
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.fs.background_jobs import BackgroundJobs
from fusecache_mount.fs.journal import OpenFileJournal
from fusecache_mount.fs.mounted_files import MountedFiles, build_mounted_files
from fusecache_mount.fs.operations import AttributePolicy, Operations
from fusecache_mount.kernel import protocol
from fusecache_mount.lifecycle import mounting
from fusecache_mount.lifecycle.keeper_link import KeeperLink, receive_start_message, send_to_keeper
from fusecache_mount.lifecycle.keeper_protocol import EXIT_UPGRADE, DaemonMessage
from fusecache_mount.lifecycle.kernel_setup import KernelSetup, decide_passthrough
from fusecache_mount.lifecycle.mount_server import EndReason, MountServer
from fusecache_mount.lifecycle.mount_settings import MountSettings
from fusecache_mount.lifecycle.service import CacheOperations, FetchOperations, make_peers_handler
from fusecache_mount.lifecycle.status_reporter import DaemonInfo, StatusReporter
from fusecache_mount.tracing.session import TraceController

_log = logging.getLogger("fusecache.daemon")

_GC_THRESHOLDS = (20_000, 20, 50)
"""Objects between two collections. Hardly anything here is a cycle, and Python's default, a collection for every 700
new objects, took a node that relays 4 % of its time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit status."""
    started_at = time.monotonic()
    parser = argparse.ArgumentParser(prog="fusecache-daemon")
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--clones", default="")
    parser.add_argument("--keeper", type=int, required=True)
    parser.add_argument("--config", type=int, required=True)
    given = parser.parse_args(arguments)
    keeper_socket = socket.socket(fileno=given.keeper)
    try:
        with os.fdopen(given.config, "rb") as file:
            file.seek(0)
            config = MountConfig.load_with_secrets(file.read())
        configure_logging(
            config.log_level, config.log_format, file=config.log_file, secrets=config.secret_values()
        )
        clone_fds = [int(fd) for fd in given.clones.split(",") if fd]
        start_message = receive_start_message(keeper_socket)
        keeper_link = KeeperLink(given.device, clone_fds, keeper_socket, start_message)
        daemon_info = DaemonInfo(start_message.restarts, os.getppid(), started_at)
        reason = trio.run(functools.partial(_serve_mount, config, keeper_link, daemon_info))
    except BaseExceptionGroup as group:
        return _report_failure(keeper_socket, first_error(group))
    except Exception as error:
        return _report_failure(keeper_socket, error)
    if reason is EndReason.UPGRADE:
        # threads still wait in read(2) of the device: they end with the process, and the kernel asks again
        logging.shutdown()
        os._exit(EXIT_UPGRADE)
    return 0


def _report_failure(keeper_socket: socket.socket, error: BaseException) -> int:
    if isinstance(error, FusecacheError):
        _log.error("%s", error)
        reason = str(error)
    else:
        _log.error("the daemon failed: %s: %s", type(error).__name__, error, exc_info=error)
        reason = f"the daemon failed ({type(error).__name__}: {error}): see its log"
    send_to_keeper(keeper_socket, DaemonMessage(error=reason))
    return 1


@dataclass(frozen=True)
class _MountParts:
    """The parts that a mount adds to its node."""

    jobs: BackgroundJobs
    open_files: MountedFiles
    channel: DeviceChannel
    reporter: StatusReporter
    server: MountServer


async def _serve_mount(config: MountConfig, keeper_link: KeeperLink, daemon_info: DaemonInfo) -> EndReason:
    directory = make_mount_runtime_dir(config.runtime_dir, config.mountpoint)
    is_first_daemon = keeper_link.answered_init is None

    def build_status() -> Mapping[str, Any]:
        return mount.reporter.build_status()

    async with build_node(
        config,
        "mount",
        build_status,
        keep_contents=not is_first_daemon,
        observed_read_ahead=min(config.read_ahead, mounting.LIMITED_READ_AHEAD_BYTES),
    ) as node:
        journal = OpenFileJournal(directory / "open", discard_existing=is_first_daemon)
        mount = _build_mount(node, keeper_link, daemon_info, journal, directory)
        mount.jobs.start()
        _tune_garbage_collector()
        reason = EndReason.UNMOUNTED
        try:
            reason = await mount.server.serve()
        finally:
            if reason is not EndReason.UPGRADE:
                mount.jobs.close()
                mount.open_files.close()
                mount.channel.close()
    journal.close(remove=reason is not EndReason.UPGRADE)
    return reason


def _build_mount(
    node: Node,
    keeper_link: KeeperLink,
    daemon_info: DaemonInfo,
    journal: OpenFileJournal,
    mount_runtime_dir: Path,
) -> _MountParts:
    """Build the parts in this order: open files, channel, operations, control. Within trio.run()."""
    config, catalog = node.config, node.mounted_catalog
    passthrough = decide_passthrough(config, keeper_link.start_message)
    backings = Backings(keeper_link.device_fd)
    trace_switch = TraceSwitch()
    jobs = BackgroundJobs()
    open_files = build_mounted_files(
        catalog,
        node.fetch_service,
        node.store,
        journal,
        events=node.events,
        jobs=jobs,
        backings=backings,
        passthrough_state=passthrough,
        trace_switch=trace_switch,
        read_observer=node.fetch_service.observers,
        open_wait_seconds=config.open_wait if config.prefetch == "auto" else 0.0,
        waits_for=is_shard,
        set_read_ahead_limited=mounting.KernelReadAhead(config.mountpoint, config.read_ahead).set_limited,
        inspector=node.inspector,
    )
    mount_settings = MountSettings(config.mountpoint, config.read_ahead)
    kernel_setup = KernelSetup(
        keeper_link,
        mount_settings,
        store_directories=node.store.directories,
        passthrough_state=passthrough,
        backings=backings,
        run_in_background=jobs.run_in_background,
    )
    token = trio.lowlevel.current_trio_token()
    channel = build_channel(
        keeper_link.device_fd,
        keeper_link.clone_fds,
        node.fetch_service,
        open_files,
        limits=protocol.InitLimits(config.max_background),
        requests_passthrough=passthrough.is_active,
        trace_switch=trace_switch,
        read_observer=node.fetch_service.observers,
        verify_always=config.verify == "always",
        on_init=lambda request, _reply: kernel_setup.note_answered_init(request),
        on_end=lambda: token.run_sync_soon(pyfuse3.terminate),
    )
    node.events.names_changed.subscribe(
        lambda changes: jobs.run_in_background(lambda: channel.notifier.invalidate_entries(changes))
    )
    operations = Operations(catalog, open_files, _attribute_policy(config))
    pyfuse3.init(operations, channel.pyfuse3_path, set(pyfuse3.default_options))
    trace_controller = TraceController(
        mount_settings,
        catalog,
        open_files,
        channel.notifier,
        trace_switch=trace_switch,
        negative_lookups=operations.negative_lookups,
    )
    reporter = StatusReporter(
        node, daemon_info, open_files=open_files, channel=channel, trace_controller=trace_controller
    )
    fetch_operations = FetchOperations(
        catalog,
        node.store,
        node.fetch_service,
        inspector=node.inspector,
        count_waiting_reads=lambda: channel.waiting_read_count,
    )
    server = MountServer(
        node,
        keeper_link,
        channel=channel,
        kernel_setup=kernel_setup,
        handlers={
            "status": reporter.answer_status,
            "peers": make_peers_handler(node.peer_node),
            "trace": trace_controller.start_trace,
            **CacheOperations(catalog, node.source_names, node.store).handlers,
            **fetch_operations.handlers,
        },
        build_status=reporter.build_status,
        mount_runtime_dir=mount_runtime_dir,
    )
    return _MountParts(jobs, open_files, channel, reporter, server)


def _attribute_policy(config: MountConfig) -> AttributePolicy:
    return AttributePolicy(
        uid=config.uid,
        gid=config.gid,
        file_mode=config.file_mode & ~config.umask,
        dir_mode=config.dir_mode & ~config.umask,
        entry_timeout=config.metadata_ttl,
        attr_timeout=config.metadata_ttl,
        negative_timeout=config.negative_ttl,
    )


def _tune_garbage_collector() -> None:
    """Exempt all that is there by now from collections: a full one stops all threads, for 45 ms with it and for 0.3 ms
    without it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


if __name__ == "__main__":
    threading.current_thread().name = "main"
    sys.exit(main())
