"""`fusecache serve`: a node that gives blocks to other nodes and mounts nothing. Stays in the foreground."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
import trio

from fusecache.assemble import Node, build_node, run_peer_node
from fusecache.config.load import load_mount_config
from fusecache.config.model import MountConfig, make_default_cache_dir
from fusecache.control.mounts import SOCKET_NAME, make_mount_runtime_dir, serve_mountpoint
from fusecache.control.server import serve_requests
from fusecache.errors import ConfigError, first_error
from fusecache.peers.node import PeerNode
from fusecache.telemetry import status
from fusecache.telemetry.logs import configure_logging
from fusecache.telemetry.metrics import StatusCollector
from fusecache.telemetry.server import MetricsServer


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


async def _serve_node(config: MountConfig) -> None:
    started_at = time.monotonic()

    def build_status() -> dict[str, Any]:
        return _build_status(node, peer_node, started_at)

    async with build_node(config, "serve", build_status) as node:
        assert node.peer_node is not None  # peers.listen is set
        peer_node = node.peer_node

        async def answer_status(request: dict[str, Any]) -> object:
            return await trio.to_thread.run_sync(build_status)

        async def answer_peers(request: dict[str, Any]) -> object:
            return await peer_node.report()

        handlers = {"status": answer_status, "peers": answer_peers}
        with contextlib.ExitStack() as stack:
            if config.metrics_port:
                metrics = MetricsServer(config.metrics_port, StatusCollector(build_status))
                stack.callback(metrics.close)
            directory = make_mount_runtime_dir(config.runtime_dir, config.mountpoint)
            signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_requests, directory / SOCKET_NAME, handlers)
                await nursery.start(run_peer_node, node)
                print(f"fusecache: serving as node {config.peers.node}", file=sys.stderr, flush=True)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()


def _build_status(node: Node, peer_node: PeerNode, started_at: float) -> dict[str, Any]:
    """The status of a node without a mount. May take a while on a store of very many objects; thread-safe."""
    origin_stats = [origin.stats for origin in node.origins.values()]
    return {
        "node": node.config.peers.node,
        "sources": status.source_rows(node.config.sources),
        "bytes": status.bytes_section(origin_stats, peer_bytes=peer_node.block_source.stats.bytes_from_peers),
        "cache": {"dir": str(node.store.directories[0]), **vars(node.store.usage())},
        "origin": status.origin_section(origin_stats),
        "loader": status.loader_section(node.fetch_service.progress(), node.fetch_service.stats),
        **({"manifest": vars(node.inspector.stats)} if node.inspector is not None else {}),
        "peers": peer_node.counters(),
        "process": status.process_section(started_at),
    }
