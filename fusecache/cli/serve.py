"""`fusecache serve`: a node that gives blocks to others and mounts nothing. Stays in the foreground."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import trio

from fusecache.config.load import load_mount_config
from fusecache.config.model import MountConfig, make_default_cache_dir
from fusecache.control.mounts import SOCKET_NAME, make_mount_runtime_dir, serve_mountpoint
from fusecache.control.server import serve_requests
from fusecache.errors import ConfigError, first_error
from fusecache.events import EventHub
from fusecache.fetch.interface import FetchSettings
from fusecache.fetch.service import FetchService
from fusecache.origin.factory import open_origin
from fusecache.origin.interface import Origin
from fusecache.peers.directory import PeerDirectory
from fusecache.peers.node import PeerNode, make_block_source
from fusecache.peers.profiles import PeerProfiles
from fusecache.prefetch.profiles.access_profile import MAX_BYTES, check_profile
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.store.factory import open_store
from fusecache.store.interface import BlockStore
from fusecache.telemetry.logs import configure_logging
from fusecache.telemetry.metrics import StatusCollector
from fusecache.telemetry.server import MetricsServer, render_metrics
from fusecache.types import ObjectVersion


@click.command("serve")
@click.argument("source", required=False)
@click.option("-o", "options", multiple=True, metavar="KEY=VALUE,...", help="Options, see docs/OPTIONS.md.")
@click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), help="TOML file with settings and sources."
)
def serve_command(source: str | None, options: tuple[str, ...], config: Path | None) -> int:
    """Give blocks of SOURCE, like s3://bucket/prefix, to the other nodes of a cluster, without a mount.

    Needs peers.listen. Without SOURCE, all sources of the config file are served. Runs until it is told to end
    (Ctrl-C, SIGTERM); says `serving` on stderr when it does.
    """
    settings = load_mount_config(source, "/fusecache-serve", [*options], config)
    if not settings.peers.listen:
        raise ConfigError("nothing to serve at: set peers.listen, like -o peers.listen=127.0.0.1:7070")
    settings = settings.model_copy(update={"mountpoint": serve_mountpoint(settings.peers.node)})
    configure_logging(
        settings.log_level, settings.log_format, file=settings.log_file, secrets=settings.secret_values()
    )
    make_default_cache_dir(settings.cache_dir)
    try:
        trio.run(_serve_node, settings)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    return 0


class _NoSiblings:
    """See loader.Library: nobody reads here, so nothing follows from what is read."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """See loader.Library."""
        return [version]

    def version_completed(self, version: ObjectVersion) -> None:
        """See loader.Library."""

    def version_gone(self, version: ObjectVersion) -> None:
        """See loader.Library."""


async def _serve_node(config: MountConfig) -> None:
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        origins: dict[str, Origin] = {}
        for source in config.sources:
            origins[source.name] = open_origin(source, config.tuning)
            stack.callback(origins[source.name].close)
        directory = PeerDirectory(
            config.peers,
            weight=config.weights_limit_bytes(),
            block_size=config.block_size,
            events=EventHub(),
        )
        stack.callback(directory.close)
        store = stack.enter_context(
            open_store(config, keep_objects=False, is_spare=directory.coverage.is_kept_elsewhere)
        )
        settings = FetchSettings(
            concurrency=config.tuning.concurrency,
            range_bytes=config.tuning.range_size,
            deadline=config.tuning.deadline,
            prefetch=False,
        )
        block_source = make_block_source(
            config.peers, directory, origins, concurrency=config.tuning.concurrency
        )
        loader = stack.enter_context(FetchService(store, origins, _NoSiblings(), settings, block_source))

        def status() -> dict[str, Any]:
            return _build_status(config, store, origins, loader, node, started)

        node = PeerNode(
            config.peers,
            directory,
            store=store,
            origins=origins,
            block_source=block_source,
            fetch_service=loader,
            peer_profiles=PeerProfiles(
                directory.name,
                directory.members,
                directory.client,
                profile_files=ProfileStore(config.cache_dir),
                check_profile=check_profile,
                max_bytes=MAX_BYTES,
            ),
            render_metrics=lambda: render_metrics(StatusCollector(status)),
        )

        async def on_status(request: dict[str, Any]) -> object:
            return await trio.to_thread.run_sync(status)

        async def on_peers(request: dict[str, Any]) -> object:
            return await node.report()

        if config.metrics_port:
            stack.callback(MetricsServer(config.metrics_port, StatusCollector(status)).close)
        runtime_dir = make_mount_runtime_dir(config.runtime_dir, config.mountpoint)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                handlers = {"status": on_status, "peers": on_peers}
                await nursery.start(functools.partial(serve_requests, runtime_dir / SOCKET_NAME, handlers))
                await nursery.start(node.run)
                print(f"fusecache: serving as node {config.peers.node}", file=sys.stderr, flush=True)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()


def _build_status(
    config: MountConfig,
    store: BlockStore,
    origins: dict[str, Origin],
    fetch_service: FetchService,
    node: PeerNode,
    started_at: float,
) -> dict[str, Any]:
    usage = store.usage()
    names = ("requests", "errors", "throttled", "retries", "lists", "bytes", "concurrency")
    return {
        "node": config.peers.node,
        "sources": [{"name": source.name, "url": source.url} for source in config.sources],
        "bytes": {
            "peer": node.block_source.stats.bytes_from_peers,
            "origin": sum(origin.stats.bytes for origin in origins.values()),
        },
        "cache": {"dir": str(store.directories[0]), **vars(usage)},
        "origin": {name: sum(getattr(origin.stats, name) for origin in origins.values()) for name in names},
        "loader": {**fetch_service.progress(), "flights": fetch_service.stats.flights},
        "peers": node.counters(),
        "process": {
            "pid": os.getpid(),
            "cpu_seconds": time.process_time(),
            "uptime": time.monotonic() - started_at,
        },
    }
