"""The daemon: puts the rooms together for one mount and serves it until it is unmounted.

Started by the keeper as `python -m fusecache_mount.lifecycle.daemon --device FD --clones FD,FD --keeper FD
--config FD`.
It talks to the keeper over the `--keeper` socket (see keeper.py), and ends with 0 after an unmount, with
EXIT_UPGRADE when asked to make way for a new version of itself, and with 1 when it can't start.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from fusecache.attest.digests import UNSIGNED, ExpectedDigests
from fusecache.attest.inspector import ManifestInspector
from fusecache.attest.manifests import is_manifest
from fusecache.attest.signing import ManifestKey
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import CatalogSource
from fusecache.config.model import MountConfig
from fusecache.control.mounts import SOCKET_NAME, make_mount_runtime_dir
from fusecache.control.server import serve_requests
from fusecache.errors import ConfigError, FusecacheError, first_error
from fusecache.events import EventHub
from fusecache.fetch.interface import FetchSettings
from fusecache.fetch.service import FetchService
from fusecache.origin.factory import open_origin
from fusecache.origin.interface import Origin
from fusecache.peers.directory import PeerDirectory
from fusecache.peers.node import PeerNode, make_block_source
from fusecache.peers.profiles import PeerProfiles
from fusecache.prefetch.models.shard_order import is_shard
from fusecache.prefetch.profiles.access_profile import MAX_BYTES, check_profile
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.store.attestation import AttestationPolicy
from fusecache.store.factory import open_store
from fusecache.store.interface import BlockStore
from fusecache.telemetry.logs import configure_logging
from fusecache.telemetry.metrics import StatusCollector
from fusecache.telemetry.server import MetricsServer, render_metrics
from fusecache.types import ObjectVersion
from fusecache_mount.device.backings import Backings, PassthroughState
from fusecache_mount.device.channel import DeviceChannel, build_channel
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.fs.background_jobs import BackgroundJobs
from fusecache_mount.fs.journal import OpenFileJournal
from fusecache_mount.fs.mounted_files import build_mounted_files
from fusecache_mount.fs.operations import AttributePolicy, Operations
from fusecache_mount.kernel import protocol
from fusecache_mount.lifecycle import fuse_mount, mounting
from fusecache_mount.lifecycle.keeper_protocol import (
    EXIT_UPGRADE,
    MAX_MESSAGE_BYTES,
    DaemonMessage,
    StartMessage,
)
from fusecache_mount.lifecycle.mount_settings import MountSettings
from fusecache_mount.lifecycle.service import ControlService, DaemonInfo
from fusecache_mount.tracing.session import TraceController

_log = logging.getLogger("fusecache.daemon")

_MAX_REQUEST_TASKS = 1000
"""Requests, other than READs, under way at once: opens may wait for their file."""
_GC_THRESHOLDS = (20_000, 20, 50)
"""Collections as rare as that: hardly anything here is a cycle, and Python's default, for every 700 new objects, took
a node that relays 4 % of its time."""
_PREFETCH_BUDGET_SHARE = 0.8
"""Share of the cache that the shards fetched ahead may take where no budget is set."""


@dataclass
class KeeperLink:
    """The descriptors from the keeper, and what it told."""

    device_fd: int
    clone_fds: list[int]
    keeper_socket: socket.socket
    start_message: StartMessage

    def send_message(self, message: DaemonMessage) -> None:
        """Send the keeper a message; a keeper that is gone is no reason to stop serving."""
        _send_to_keeper(self.keeper_socket, message)

    @property
    def answered_init(self) -> bytes | None:
        """The kernel's INIT request, if an earlier daemon on this device answered it."""
        return self.start_message.answered_init


def _send_to_keeper(keeper_socket: socket.socket, message: DaemonMessage) -> None:
    with contextlib.suppress(OSError):
        keeper_socket.send(message.to_json())


class MountCatalogView:
    """What the loader asks of the catalog and the handles; see loader.Library."""

    def __init__(self, catalog: Catalog, events: EventHub) -> None:
        self.fetch_service: FetchService | None = None
        self._catalog = catalog
        self._events = events

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """The versions in the folder of this object, as the tree has them."""
        return self._catalog.index.siblings(version)

    def find_object(self, version: ObjectVersion, key: str) -> ObjectVersion | None:
        """The version of another object of the same source, as the tree has it."""
        return self._catalog.index.find_object(version, key)

    def read_object(self, version: ObjectVersion, source: str) -> bytes:
        """See attest.Digests: all of an object, by way of the store."""
        assert self.fetch_service is not None
        object_fetch = self.fetch_service.open_object(version, source)
        try:
            return self.fetch_service.read_bytes(object_fetch, 0, version.size)
        finally:
            self.fetch_service.release_fetch(object_fetch)

    def version_completed(self, version: ObjectVersion) -> None:
        """See loader.Library."""
        self._events.object_completed.publish(version)

    def version_gone(self, version: ObjectVersion) -> None:
        """Have the origin asked for the object anew."""
        self._catalog.listings.report_gone_version(version)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit status."""
    started = time.monotonic()
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
        keeper_link = KeeperLink(
            given.device,
            [int(fd) for fd in given.clones.split(",") if fd],
            keeper_socket,
            StartMessage.from_json(keeper_socket.recv(MAX_MESSAGE_BYTES)),
        )
        facts = DaemonInfo(keeper_link.start_message.restarts, os.getppid(), started)
        return trio.run(functools.partial(_build_and_serve, config, keeper_link, facts))
    except BaseExceptionGroup as group:
        return _report_failure(keeper_socket, first_error(group))
    except Exception as error:
        return _report_failure(keeper_socket, error)


def _report_failure(keeper_socket: socket.socket, error: BaseException) -> int:
    if isinstance(error, FusecacheError):
        _log.error("%s", error)
        _send_to_keeper(keeper_socket, DaemonMessage(error=str(error)))
    else:
        _log.error("the daemon failed: %s: %s", type(error).__name__, error, exc_info=error)
        failure = f"the daemon failed ({type(error).__name__}: {error}): see its log"
        _send_to_keeper(keeper_socket, DaemonMessage(error=failure))
    return 1


@contextlib.contextmanager
def _open_origins_and_store(
    config: MountConfig, keeper_link: KeeperLink, events: EventHub
) -> Iterator[tuple[dict[str, Origin], PeerDirectory | None, BlockStore]]:
    with contextlib.ExitStack() as stack:
        origins: dict[str, Origin] = {}
        for source in config.sources:
            origins[source.name] = open_origin(source, config.tuning)
            stack.callback(origins[source.name].close)
        seals = (
            None
            if config.verify != "manifest"
            else AttestationPolicy(_read_trust_anchor(config), is_manifest)
        )
        peer_directory: PeerDirectory | None = None
        if config.peers.is_enabled:
            peer_directory = PeerDirectory(
                config.peers,
                weight=config.weights_limit_bytes(),
                block_size=config.block_size,
                events=events,
            )
            stack.callback(peer_directory.close)
        store = stack.enter_context(
            open_store(
                config,
                keep_objects=keeper_link.answered_init is not None,
                attestation_policy=seals,
                is_spare=None if peer_directory is None else peer_directory.coverage.is_kept_elsewhere,
            )
        )
        yield origins, peer_directory, store


async def _build_and_serve(config: MountConfig, keeper_link: KeeperLink, daemon_info: DaemonInfo) -> int:
    directory = make_mount_runtime_dir(config.runtime_dir, config.mountpoint)
    events = EventHub()
    with _open_origins_and_store(config, keeper_link, events) as (origins, peer_directory, store):
        catalog = Catalog(
            [
                CatalogSource(
                    source.name,
                    origins[source.name].identity,
                    origins[source.name].list_objects,
                    origins[source.name].stat_object,
                )
                for source in config.sources
            ],
            events=events,
            ttl=config.metadata_ttl,
            negative_ttl=config.negative_ttl,
            snapshot_dir=config.cache_dir / "listings",
        )
        await catalog.listings.start()
        catalog_view = MountCatalogView(catalog, events)
        budget = config.prefetch_budget
        settings = FetchSettings(
            concurrency=config.tuning.concurrency,
            range_bytes=config.tuning.range_size,
            deadline=config.tuning.deadline,
            prefetch=config.prefetch == "auto",
            prefetch_budget=int(config.weights_limit_bytes() * _PREFETCH_BUDGET_SHARE)
            if budget is None
            else budget,
            learn=config.learn == "auto",
            read_ahead=min(config.read_ahead, mounting.LIMITED_READ_AHEAD_BYTES),
        )
        inspector = _build_inspector(config, catalog_view, origins)
        journal = OpenFileJournal(directory / "open", discard_existing=keeper_link.answered_init is None)
        upgrade = False
        orders = ProfileStore(config.cache_dir)
        block_source = (
            None
            if peer_directory is None
            else make_block_source(
                config.peers, peer_directory, origins, concurrency=config.tuning.concurrency
            )
        )
        others = (
            None
            if peer_directory is None
            else PeerProfiles(
                peer_directory.name,
                peer_directory.members,
                peer_directory.client,
                profile_files=orders,
                check_profile=check_profile,
                max_bytes=MAX_BYTES,
            )
        )
        with FetchService(
            store, origins, catalog_view, settings, block_source, orders, others, inspector
        ) as fetch_service:
            catalog_view.fetch_service = fetch_service
            if inspector is not None:
                inspector.start(fetch_service)
            passthrough = _decide_passthrough(config, keeper_link)
            trace_switch = TraceSwitch()
            jobs = BackgroundJobs()
            open_files = build_mounted_files(
                catalog,
                fetch_service,
                store,
                journal,
                events=events,
                jobs=jobs,
                backings=Backings(keeper_link.device_fd),
                passthrough_state=passthrough,
                trace_switch=trace_switch,
                open_wait_seconds=config.open_wait if config.prefetch == "auto" else 0.0,
                waits_for=is_shard,
                set_read_ahead_limited=mounting.KernelReadAhead(
                    config.mountpoint, config.read_ahead
                ).set_limited,
                inspector=inspector,
            )
            token = trio.lowlevel.current_trio_token()
            channel = build_channel(
                keeper_link.device_fd,
                keeper_link.clone_fds,
                fetch_service,
                open_files,
                limits=protocol.InitLimits(config.max_background),
                requests_passthrough=passthrough.is_active,
                trace_switch=trace_switch,
                verify_always=config.verify == "always",
                on_init=lambda request, reply: _report_init(
                    config, keeper_link, passthrough, jobs, store, request, reply
                ),
                on_end=lambda: token.run_sync_soon(pyfuse3.terminate),
            )

            events.names_changed.subscribe(
                lambda changes: jobs.run_in_background(lambda: channel.notifier.invalidate_entries(changes))
            )
            operations = Operations(
                catalog,
                open_files,
                AttributePolicy(
                    uid=config.uid,
                    gid=config.gid,
                    file_mode=config.file_mode & ~config.umask,
                    dir_mode=config.dir_mode & ~config.umask,
                    entry_timeout=config.metadata_ttl,
                    attr_timeout=config.metadata_ttl,
                    negative_timeout=config.negative_ttl,
                ),
            )
            pyfuse3.init(operations, channel.pyfuse3_path, set(pyfuse3.default_options))
            peer_node: PeerNode | None = None
            if peer_directory is not None and block_source is not None:
                peer_node = PeerNode(
                    config.peers,
                    peer_directory,
                    store=store,
                    origins=origins,
                    block_source=block_source,
                    fetch_service=fetch_service,
                    peer_profiles=others,
                    render_metrics=lambda: render_metrics(StatusCollector(service.build_status)),
                )
            service = ControlService(
                config,
                daemon_info,
                catalog=catalog,
                origins=origins,
                store=store,
                fetch_service=fetch_service,
                open_files=open_files,
                channel=channel,
                trace_controller=TraceController(
                    MountSettings(config.mountpoint, config.read_ahead),
                    catalog,
                    open_files,
                    channel.notifier,
                    trace_switch=trace_switch,
                    negative_lookups=operations.negative_lookups,
                ),
                cluster=peer_node,
                profile_store=orders,
                inspector=inspector,
            )
            jobs.start()
            # what is there by now stays: a full collection stops all threads, without it for 0.3 ms instead of 45
            gc.collect()
            gc.freeze()
            gc.set_threshold(*_GC_THRESHOLDS)
            try:
                upgrade = await _serve_until_unmounted(
                    config,
                    keeper_link,
                    service,
                    channel,
                    passthrough,
                    jobs,
                    directory,
                    peer_node,
                    fetch_service,
                )
            finally:
                if inspector is not None:
                    inspector.close()
                if not upgrade:
                    jobs.close()
                    open_files.close()
                    channel.close()
        journal.close(remove=not upgrade)
    if upgrade:
        # threads still wait in read(2) of the device: they end with the process, and the kernel asks again
        logging.shutdown()
        os._exit(EXIT_UPGRADE)
    return 0


async def _serve_until_unmounted(
    config: MountConfig,
    keeper_link: KeeperLink,
    control_service: ControlService,
    channel: DeviceChannel,
    passthrough: PassthroughState,
    jobs: BackgroundJobs,
    mount_runtime_dir: Path,
    cluster: PeerNode | None,
    fetch_service: FetchService,
) -> bool:
    """Serve until the end; True: make way for an upgrade."""
    upgrade = False
    with contextlib.ExitStack() as stack:
        if config.metrics_port:
            server = MetricsServer(config.metrics_port, StatusCollector(control_service.build_status))
            stack.callback(server.close)
        async with trio.open_nursery() as nursery:

            async def watch_signals() -> None:
                nonlocal upgrade
                with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT) as signals:
                    async for number in signals:
                        upgrade = number == signal.SIGUSR1
                        _log.info("ending on %s", signal.Signals(number).name)
                        nursery.cancel_scope.cancel()

            nursery.start_soon(watch_signals)
            await nursery.start(serve_requests, mount_runtime_dir / SOCKET_NAME, control_service.handlers)
            if cluster is not None:
                await nursery.start(cluster.run)
            nursery.start_soon(
                functools.partial(
                    trio.to_thread.run_sync, channel.start, config.threads, keeper_link.answered_init
                )
            )
            if keeper_link.answered_init is not None:
                jobs.run_in_background(
                    lambda: _configure_kernel(
                        config,
                        keeper_link,
                        passthrough,
                        fetch_service.store,
                        keeper_link.answered_init or b"",
                    )
                )
            keeper_link.send_message(DaemonMessage(is_ready=True))
            _log.info("serving %s", config.mountpoint)
            await pyfuse3.main(max_tasks=_MAX_REQUEST_TASKS)
            nursery.cancel_scope.cancel()
    return upgrade


def _read_manifest_key(config: MountConfig) -> ManifestKey | None:
    if config.manifest_key is None:
        return None
    try:
        return ManifestKey(config.manifest_key.read_bytes())
    except OSError as error:
        raise ConfigError(f"manifest_key {config.manifest_key}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"manifest_key {config.manifest_key} {error}") from None


def _read_trust_anchor(config: MountConfig) -> bytes:
    key = _read_manifest_key(config)
    return UNSIGNED if key is None else key.anchor


def _build_inspector(
    config: MountConfig, catalog_view: MountCatalogView, origins: Mapping[str, Origin]
) -> ManifestInspector | None:
    if config.verify != "manifest":
        return None

    def ask(version: ObjectVersion, source: str) -> bytes | None:
        return origins[source].read_metadata_sha256(version)

    return ManifestInspector(
        ExpectedDigests(catalog_view.find_object, catalog_view.read_object, ask, _read_manifest_key(config))
    )


def _decide_passthrough(config: MountConfig, keeper_link: KeeperLink) -> PassthroughState:
    if config.passthrough == "off":
        return PassthroughState(False, "turned off (passthrough=off)")
    if config.verify == "always":
        return PassthroughState(False, "verify=always: every read is checked by the daemon")
    if not keeper_link.start_message.is_privileged:
        reason = keeper_link.start_message.unprivileged_reason
        return PassthroughState(False, reason or "it needs CAP_SYS_ADMIN: mount as root")
    return PassthroughState(True, "")


def _report_init(
    config: MountConfig,
    keeper_link: KeeperLink,
    passthrough: PassthroughState,
    jobs: BackgroundJobs,
    store: BlockStore,
    init_request: bytes,
    init_reply: bytes,
) -> None:
    keeper_link.send_message(DaemonMessage(answered_init=init_request))
    jobs.run_in_background(lambda: _configure_kernel(config, keeper_link, passthrough, store, init_request))


def _configure_kernel(
    config: MountConfig,
    keeper_link: KeeperLink,
    passthrough: PassthroughState,
    store: BlockStore,
    init_request: bytes,
) -> None:
    """After INIT: try passthrough on a file of each directory of the store, and make the kernel read ahead."""
    try:
        mounting.set_read_ahead(config.mountpoint, config.read_ahead)
    except (OSError, FusecacheError) as error:
        _log.info("the kernel's read-ahead stays as it is: %s", error)
    with contextlib.suppress(OSError):
        if fuse_mount.is_writable(config.mountpoint):  # a daemon that was killed while somebody traced
            mounting.set_writable(config.mountpoint, writable=False)
    if not passthrough.is_active:
        return
    if not protocol.supports_passthrough(init_request):
        passthrough.turn_off(f"kernel {os.uname().release} can't: it needs Linux 6.9 or newer")
        return
    backings = Backings(keeper_link.device_fd)
    whys = [backings.find_refusal_reason(directory) for directory in store.directories]
    if all(whys):
        passthrough.turn_off(whys[0])
    else:
        passthrough.confirm("complete files are read by the kernel itself")
        _log.info("passthrough is on")


if __name__ == "__main__":
    threading.current_thread().name = "main"
    sys.exit(main())
