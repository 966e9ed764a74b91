"""The daemon: puts the rooms together for one mount and serves it until it is unmounted.

Started by the keeper as `python -m fusecache.mount.daemon --device FD --clones FD,FD --keeper FD --config FD`.
It talks to the keeper over the `--keeper` socket (see keeper.py), and ends with 0 after an unmount, with
EXIT_UPGRADE when asked to make way for a new version of itself, and with 1 when it can't start.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import gc
import json
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
from typing import Any

import pyfuse3
import trio

from fusecache import control
from fusecache.attest.digests import UNSIGNED, Digests
from fusecache.attest.inspector import Inspector
from fusecache.attest.manifests import is_manifest
from fusecache.attest.signing import Key
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import CatalogSource
from fusecache.cluster.cluster import Cluster
from fusecache.config.model import MountConfig
from fusecache.errors import ConfigError, FusecacheError
from fusecache.loader.interface import LoaderSettings
from fusecache.loader.loader import Loader
from fusecache.mount import mounting, protocol
from fusecache.mount.backings import Backings, Passthrough
from fusecache.mount.channel import Channel
from fusecache.mount.handles import Handles
from fusecache.mount.journal import Journal
from fusecache.mount.operations import AttributePolicy, Operations
from fusecache.mount.service import Facts, Service
from fusecache.mount.tracing import Tracing
from fusecache.mounts import SOCKET_NAME, mount_directory
from fusecache.origin.base import Origin
from fusecache.origin.factory import open_origin
from fusecache.store.interface import BlockStore
from fusecache.store.making import open_store
from fusecache.store.orders import Orders
from fusecache.store.seals import Seals
from fusecache.telemetry.logs import configure_logging
from fusecache.telemetry.metrics import StatusCollector
from fusecache.telemetry.server import MetricsServer, metrics_page
from fusecache.types import ObjectVersion

_log = logging.getLogger("fusecache.daemon")

EXIT_UPGRADE = 75
_MESSAGE = 1 << 20
_TASKS = 1000
"""Requests, other than READs, under way at once: opens may wait for their file."""
_GARBAGE = (20_000, 20, 50)
"""Collections as rare as that: hardly anything here is a cycle, and Python's default, for every 700 new objects, took
a node that relays 4 % of its time."""
_BUDGET_SHARE = 0.8
"""Share of the cache that the shards fetched ahead may take where no budget is set."""


@dataclass
class Inherited:
    """The descriptors from the keeper, and what it told."""

    device: int
    clones: list[int]
    keeper: socket.socket
    told: dict[str, Any]
    """Its first message: {"restarts", "init", "mount_id", "runtime_dir", "privileged", "why"}."""

    def tell(self, **message: Any) -> None:
        """Send the keeper a message; a keeper that is gone is no reason to stop serving."""
        with contextlib.suppress(OSError):
            self.keeper.send(json.dumps(message).encode())

    @property
    def replay(self) -> bytes | None:
        """The kernel's INIT request, if an earlier daemon on this device answered it."""
        found = self.told.get("init")
        return base64.b64decode(found) if found else None


class Library:
    """What the loader asks of the catalog and the handles; see loader.Library."""

    def __init__(self, catalog: Catalog, sources: Mapping[str, str]) -> None:
        self.handles: Handles | None = None
        self.loader: Loader | None = None
        self._catalog = catalog
        self._sources = sources
        """Identity of an origin -> name of its source."""

    def _path(self, version: ObjectVersion) -> str:
        source = self._sources.get(version.origin, "")
        return f"{source}/{version.key}" if source else version.key

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """See loader.Library."""
        entry = self._catalog.find(self._path(version))
        if entry is None:
            return [version]
        return [other.version for other in self._catalog.siblings(entry) if other.version is not None]

    def find(self, version: ObjectVersion, key: str) -> ObjectVersion | None:
        """See attest.Digests: another object of the same source."""
        source = self._sources.get(version.origin, "")
        entry = self._catalog.find(f"{source}/{key}" if source else key)
        return None if entry is None else entry.version

    def read(self, version: ObjectVersion, source: str) -> bytes:
        """See attest.Digests: all of an object, by way of the store."""
        assert self.loader is not None
        load = self.loader.open(version, source)
        try:
            return self.loader.read(load, 0, version.size)
        finally:
            self.loader.release(load)

    def completed(self, version: ObjectVersion) -> None:
        """See loader.Library."""
        if self.handles is not None:
            self.handles.completed(version)

    def gone(self, version: ObjectVersion) -> None:
        """See loader.Library."""
        entry = self._catalog.find(self._path(version))
        if entry is not None and entry.version == version:
            self._catalog.changed(entry)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit status."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="fusecache-daemon")
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--clones", default="")
    parser.add_argument("--keeper", type=int, required=True)
    parser.add_argument("--config", type=int, required=True)
    given = parser.parse_args(arguments)
    keeper = socket.socket(fileno=given.keeper)
    inherited = Inherited(given.device, [int(fd) for fd in given.clones.split(",") if fd], keeper, {})
    try:
        with os.fdopen(given.config, "rb") as file:
            file.seek(0)
            config = MountConfig.load_private(file.read())
        configure_logging(config.log_level, config.log_format, file=config.log_file, secrets=config.secrets())
        inherited.told = json.loads(keeper.recv(_MESSAGE))
        facts = Facts(int(inherited.told.get("restarts", 0)), os.getppid(), started)
        return trio.run(functools.partial(_serve, config, inherited, facts))
    except BaseExceptionGroup as group:
        return _failed(inherited, _first(group))
    except Exception as error:
        return _failed(inherited, error)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _failed(inherited: Inherited, error: BaseException) -> int:
    if isinstance(error, FusecacheError):
        _log.error("%s", error)
        inherited.tell(error=str(error))
    else:
        _log.error("the daemon failed: %s: %s", type(error).__name__, error, exc_info=error)
        inherited.tell(error=f"the daemon failed ({type(error).__name__}: {error}): see its log")
    return 1


@contextlib.contextmanager
def _rooms(config: MountConfig, inherited: Inherited) -> Iterator[tuple[dict[str, Origin], BlockStore]]:
    with contextlib.ExitStack() as stack:
        origins: dict[str, Origin] = {}
        for source in config.sources:
            origins[source.name] = open_origin(source, config.tuning)
            stack.callback(origins[source.name].close)
        seals = None if config.verify != "manifest" else Seals(_anchor(config), is_manifest)
        store = stack.enter_context(open_store(config, keep=inherited.replay is not None, seals=seals))
        yield origins, store


async def _serve(config: MountConfig, inherited: Inherited, facts: Facts) -> int:
    directory = mount_directory(config.runtime_dir, config.mountpoint)
    with _rooms(config, inherited) as (origins, store):
        catalog = Catalog(
            [
                CatalogSource(source.name, origins[source.name].identity, origins[source.name].list,
                              origins[source.name].stat)
                for source in config.sources
            ],
            ttl=config.metadata_ttl,
            negative_ttl=config.negative_ttl,
            snapshot_dir=config.cache_dir / "listings",
        )  # fmt: skip
        await catalog.start()
        library = Library(catalog, {origin.identity: name for name, origin in origins.items()})
        budget = config.prefetch_budget
        settings = LoaderSettings(
            concurrency=config.tuning.concurrency,
            range_bytes=config.tuning.range_size,
            deadline=config.tuning.deadline,
            prefetch=config.prefetch == "auto",
            budget=int(config.weights_limit() * _BUDGET_SHARE) if budget is None else budget,
            learn=config.learn == "auto",
            read_ahead=min(config.read_ahead, mounting.READ_AHEAD_LITTLE),
        )
        cluster = _cluster(config, store, origins)
        inspector = _inspector(config, library, origins)
        supplier = cluster.exchange if cluster is not None else None
        journal = Journal(directory / "open", fresh=inherited.replay is None)
        upgrade = False
        orders = Orders(config.cache_dir)
        others = cluster.share(orders) if cluster is not None else None
        with Loader(store, origins, library, settings, supplier, orders, others, inspector) as loader:
            library.loader = loader
            if inspector is not None:
                inspector.start(loader)
            passthrough = _passthrough(config, inherited)
            handles = Handles(
                catalog,
                loader,
                store,
                journal,
                backings=Backings(inherited.device),
                passthrough=passthrough,
                open_wait=config.open_wait if config.prefetch == "auto" else 0.0,
                set_read_ahead=mounting.ReadAhead(config.mountpoint, config.read_ahead).set_little,
                inspector=inspector,
            )
            library.handles = handles
            token = trio.lowlevel.current_trio_token()
            channel = Channel(
                inherited.device,
                inherited.clones,
                loader,
                handles,
                limits=protocol.Limits(config.max_background),
                passthrough=passthrough.active,
                verify_always=config.verify == "always",
                on_init=lambda request, reply: _on_init(config, inherited, handles, store, request, reply),
                on_end=lambda: token.run_sync_soon(pyfuse3.terminate),
            )

            def invalidate(changes: Sequence[tuple[int, bytes]]) -> None:
                for parent, name in changes:
                    channel.invalidate_entry(parent, name)

            catalog.on_change = lambda changes: handles.later(lambda: invalidate(changes))
            operations = Operations(
                catalog,
                handles,
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
            service = Service(
                config,
                facts,
                catalog=catalog,
                origins=origins,
                store=store,
                loader=loader,
                handles=handles,
                channel=channel,
                tracing=Tracing(config, catalog, handles, channel, operations.absent),
                cluster=cluster,
                orders=orders,
                inspector=inspector,
            )
            handles.start()
            # what is there by now stays: a full collection stops all threads, without it for 0.3 ms instead of 45
            gc.collect()
            gc.freeze()
            gc.set_threshold(*_GARBAGE)
            try:
                upgrade = await _run(config, inherited, service, channel, handles, directory, cluster, loader)
            finally:
                if inspector is not None:
                    inspector.close()
                if not upgrade:
                    handles.close()
                    channel.close()
        journal.close(remove=not upgrade)
    if upgrade:
        # threads still wait in read(2) of the device: they end with the process, and the kernel asks again
        logging.shutdown()
        os._exit(EXIT_UPGRADE)
    return 0


async def _run(
    config: MountConfig,
    inherited: Inherited,
    service: Service,
    channel: Channel,
    handles: Handles,
    directory: Path,
    cluster: Cluster | None,
    loader: Loader,
) -> bool:
    """Serve until the end; True: make way for an upgrade."""
    upgrade = False
    with contextlib.ExitStack() as stack:
        if config.metrics_port:
            server = MetricsServer(config.metrics_port, StatusCollector(service.status))
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
            await nursery.start(control.serve, directory / SOCKET_NAME, service.handlers)
            if cluster is not None:
                stack.callback(cluster.close)
                cluster.metrics = lambda: metrics_page(StatusCollector(service.status))
                await nursery.start(cluster.run, loader)
            nursery.start_soon(
                functools.partial(trio.to_thread.run_sync, channel.start, config.threads, inherited.replay)
            )
            if inherited.replay is not None:
                handles.later(
                    lambda: _probe(config, inherited, handles, loader.store, inherited.replay or b"")
                )
            inherited.tell(ready=True)
            _log.info("serving %s", config.mountpoint)
            await pyfuse3.main(max_tasks=_TASKS)
            nursery.cancel_scope.cancel()
    return upgrade


def _key(config: MountConfig) -> Key | None:
    if config.manifest_key is None:
        return None
    try:
        return Key(config.manifest_key.read_bytes())
    except OSError as error:
        raise ConfigError(f"manifest_key {config.manifest_key}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"manifest_key {config.manifest_key} {error}") from None


def _anchor(config: MountConfig) -> bytes:
    key = _key(config)
    return UNSIGNED if key is None else key.anchor


def _inspector(config: MountConfig, library: Library, origins: Mapping[str, Origin]) -> Inspector | None:
    if config.verify != "manifest":
        return None

    def ask(version: ObjectVersion, source: str) -> bytes | None:
        return origins[source].sha256(version)

    return Inspector(Digests(library.find, library.read, ask, _key(config)))


def _cluster(config: MountConfig, store: BlockStore, origins: Mapping[str, Origin]) -> Cluster | None:
    if not config.peers.wanted:
        return None
    return Cluster(
        config.peers,
        store,
        origins,
        concurrency=config.tuning.concurrency,
        weight=config.weights_limit(),
    )


def _passthrough(config: MountConfig, inherited: Inherited) -> Passthrough:
    if config.passthrough == "off":
        return Passthrough(False, "turned off (passthrough=off)")
    if config.verify == "always":
        return Passthrough(False, "verify=always: every read is checked by the daemon")
    if not inherited.told.get("privileged", True):
        return Passthrough(False, str(inherited.told.get("why") or "it needs CAP_SYS_ADMIN: mount as root"))
    return Passthrough(True, "")


def _on_init(
    config: MountConfig,
    inherited: Inherited,
    handles: Handles,
    store: BlockStore,
    request: bytes,
    reply: bytes,
) -> None:
    inherited.tell(init=base64.b64encode(request).decode(), reply=base64.b64encode(reply).decode())
    handles.later(lambda: _probe(config, inherited, handles, store, request))


def _probe(
    config: MountConfig, inherited: Inherited, handles: Handles, store: BlockStore, request: bytes
) -> None:
    """After INIT: try passthrough on a file of each directory of the store, and make the kernel read ahead."""
    try:
        mounting.set_read_ahead(config.mountpoint, config.read_ahead)
    except (OSError, FusecacheError) as error:
        _log.info("the kernel's read-ahead stays as it is: %s", error)
    with contextlib.suppress(OSError):
        if mounting.is_writable(config.mountpoint):  # a daemon that was killed while somebody traced
            mounting.remount(config.mountpoint, writable=False)
    passthrough = handles.passthrough
    if not passthrough.active:
        return
    if not protocol.wants_passthrough(request):
        passthrough.refuse(f"kernel {os.uname().release} can't: it needs Linux 6.9 or newer")
        return
    backings = Backings(inherited.device)
    whys = [backings.refusal(directory) for directory in store.directories]
    if all(whys):
        passthrough.refuse(whys[0])
    else:
        passthrough.why = "complete files are read by the kernel itself"
        _log.info("passthrough is on")


if __name__ == "__main__":
    threading.current_thread().name = "main"
    sys.exit(main())
