"""The status of a mount: what `fusecache status` shows and the metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

from fusecache.assemble import Node
from fusecache.telemetry import status
from fusecache_mount.device.channel import DeviceChannel
from fusecache_mount.fs.mounted_files import MountedFiles
from fusecache_mount.tracing.session import TraceController


@dataclass(frozen=True)
class DaemonInfo:
    """Facts about this daemon that do not change. `started_at` is a time of time.monotonic()."""

    restarts: int
    keeper_pid: int
    started_at: float


class StatusReporter:
    """Builds the status of one mount from the parts of its node, and from those that the mount adds."""

    def __init__(
        self,
        node: Node,
        daemon_info: DaemonInfo,
        *,
        open_files: MountedFiles,
        channel: DeviceChannel,
        trace_controller: TraceController,
    ) -> None:
        self._node = node
        self._daemon_info = daemon_info
        self._open_files = open_files
        self._channel = channel
        self._trace_controller = trace_controller

    async def answer_status(self, request: dict[str, Any]) -> object:
        """The handler of the operation `status`."""
        return await trio.to_thread.run_sync(self.build_status)

    def build_status(self) -> dict[str, Any]:
        """The whole status; may take a while on a store of very many objects. Thread-safe."""
        node, reads, opens = self._node, self._channel.stats, self._open_files.stats
        passthrough = self._open_files.passthrough_state
        progress = node.fetch_service.progress()
        origin_stats = [origin.stats for origin in node.origins.values()]
        peer_bytes = 0 if node.peer_node is None else node.peer_node.block_source.stats.bytes_from_peers
        files, size = node.mounted_catalog.index.totals
        return {
            "mountpoint": str(node.config.mountpoint),
            "sources": [
                {**row, "engine": origin.engine, "identity": origin.identity}
                for row in status.source_rows(node.config.sources)
                for origin in [node.origins[row["name"]]]
            ],
            "mode": {"now": "passthrough" if passthrough.is_active else "daemon", "why": passthrough.reason},
            "bytes": {
                "store": reads.bytes_store,
                **status.bytes_section(origin_stats, peer_bytes=peer_bytes),
            },
            "opens": {"passthrough": opens.passthrough_opens, "daemon": opens.daemon_opens},
            "cache": self._build_cache_section(),
            "origin": status.origin_section(origin_stats),
            "loader": {
                **status.loader_section(progress, node.fetch_service.stats),
                "waiting": self._channel.waiting_read_count,
                "flights_failed": node.fetch_service.stats.flights_failed,
                "bytes_uncached": node.fetch_service.stats.bytes_uncached,
            },
            "orders": {
                "stored": node.profile_store.profile_count(),
                "replaying": progress["replaying"],
                **vars(node.profile_stats),
            },
            **({"manifest": vars(node.inspector.stats)} if node.inspector is not None else {}),
            **({"peers": node.peer_node.counters()} if node.peer_node is not None else {}),
            "reads": {"answered": reads.reads, "waited_bytes": reads.bytes_fetched, "failed": reads.errors},
            "errors": {"reads": reads.errors},
            "tracing": self._trace_controller.is_running,
            "catalog": {"files": files, "bytes": size, "age": node.mounted_catalog.listings.oldest_age},
            "process": {
                **status.process_section(self._daemon_info.started_at),
                "rss": status.resident_bytes(),
                "keeper_pid": self._daemon_info.keeper_pid,
                "restarts": self._daemon_info.restarts,
            },
        }

    def _build_cache_section(self) -> dict[str, Any]:
        usage = self._node.store.usage()
        return {
            "dir": str(self._node.store.directories[0]),
            "store": self._node.config.store,
            "used": usage.used,
            "limit": usage.limit,
            "memory_used": usage.memory_used,
            "memory_limit": usage.memory_limit,
            "objects_complete": usage.objects_complete,
            "objects_partial": usage.objects_partial,
            "evictions": usage.evictions,
            "objects_quarantined": usage.objects_quarantined,
            "corrupt_blocks": usage.corrupt_blocks,
            "sick": usage.sick,
        }
