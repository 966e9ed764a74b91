"""What the daemon tells and does for the command line: the operations of the control socket."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from fusecache.attest.inspector import ManifestInspector
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import Entry
from fusecache.config.model import MountConfig
from fusecache.errors import AttestationError, ConfigError, FusecacheError, NotFoundError
from fusecache.fetch.service import FetchService
from fusecache.origin.interface import Origin
from fusecache.peers.node import PeerNode
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.store.disk.format import AttestationState
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion
from fusecache_mount.device.channel import DeviceChannel
from fusecache_mount.fs.mounted_files import MountedFiles
from fusecache_mount.tracing.session import TraceController

_DRAIN_TIMEOUT = 10.0
"""Most seconds that a drain waits for reads under way."""


@dataclass
class DaemonInfo:
    """What the keeper told."""

    restarts: int
    keeper_pid: int
    started_at: float


class ControlService:
    """The parts of one daemon, seen from outside. `handlers` is for fusecache.control.serve."""

    def __init__(
        self,
        config: MountConfig,
        daemon_info: DaemonInfo,
        *,
        catalog: Catalog,
        origins: Mapping[str, Origin],
        store: BlockStore,
        fetch_service: FetchService,
        open_files: MountedFiles,
        channel: DeviceChannel,
        trace_controller: TraceController,
        cluster: PeerNode | None = None,
        profile_store: ProfileStore,
        inspector: ManifestInspector | None = None,
    ) -> None:
        self._profile_store = profile_store
        self._config = config
        self._daemon_info = daemon_info
        self._catalog = catalog
        self._origins = origins
        self._store = store
        self._fetch_service = fetch_service
        self._open_files = open_files
        self._channel = channel
        self._trace_controller = trace_controller
        self._cluster = cluster
        self._inspector = inspector

    @property
    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], Awaitable[object]]]:
        """Operation -> what answers it."""
        return {
            "status": self._answer_status,
            "ls": self._answer_ls,
            "evict": self._answer_evict,
            "pin": self._answer_pin,
            "refresh": self._answer_refresh,
            "drain": self._answer_drain,
            "fetch": self._answer_fetch,
            "peers": self._answer_peers,
            "trace": self._trace_controller.start_trace,
        }

    # -- status

    def build_status(self) -> dict[str, Any]:
        """The whole status; may take a while on a store of very many objects. Thread-safe."""
        reads, opens, usage = self._channel.stats, self._open_files.stats, self._store.usage()
        passthrough = self._open_files.passthrough_state
        progress = self._fetch_service.progress()
        origins = self._origins.values()
        files, size = self._catalog.index.totals
        return {
            "mountpoint": str(self._config.mountpoint),
            "sources": [
                {
                    "name": source.name,
                    "url": source.url,
                    "engine": self._origins[source.name].engine,
                    "identity": self._origins[source.name].identity,
                }
                for source in self._config.sources
            ],
            "mode": {"now": "passthrough" if passthrough.is_active else "daemon", "why": passthrough.reason},
            "bytes": {
                "store": reads.bytes_store,
                "peer": self._cluster.block_source.stats.bytes_from_peers if self._cluster is not None else 0,
                "origin": sum(origin.stats.bytes for origin in origins),
            },
            "opens": {"passthrough": opens.passthrough_opens, "daemon": opens.daemon_opens},
            "cache": {
                "dir": str(self._store.directories[0]),
                "store": self._config.store,
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
            },
            "origin": {
                name: sum(getattr(origin.stats, name) for origin in origins)
                for name in ("requests", "errors", "throttled", "retries", "lists", "bytes", "concurrency")
            },
            "loader": {
                **progress,
                "waiting": self._channel.waiting_read_count,
                "flights": self._fetch_service.stats.flights,
                "flights_failed": self._fetch_service.stats.flights_failed,
                "bytes_uncached": self._fetch_service.stats.bytes_uncached,
            },
            "orders": {
                "stored": self._profile_store.profile_count(),
                "replaying": progress["replaying"],
                **vars(self._fetch_service.session_tracker.stats),
            },
            **({"manifest": vars(self._inspector.stats)} if self._inspector is not None else {}),
            **({"peers": self._cluster.counters()} if self._cluster is not None else {}),
            "reads": {"answered": reads.reads, "waited_bytes": reads.bytes_fetched, "failed": reads.errors},
            "errors": {"reads": reads.errors},
            "tracing": self._trace_controller.is_running,
            "catalog": {"files": files, "bytes": size, "age": self._catalog.listings.oldest_age},
            "process": {
                "pid": os.getpid(),
                "rss": _resident_bytes(),
                "cpu_seconds": time.process_time(),
                "uptime": time.monotonic() - self._daemon_info.started_at,
                "keeper_pid": self._daemon_info.keeper_pid,
                "restarts": self._daemon_info.restarts,
            },
        }

    async def _answer_status(self, request: dict[str, Any]) -> object:
        return await trio.to_thread.run_sync(self.build_status)

    async def _answer_peers(self, request: dict[str, Any]) -> object:
        if self._cluster is None:
            raise ConfigError("this mount is no node of a cluster: see peers.discovery")
        return await self._cluster.report()

    # -- the cache

    async def _answer_ls(self, request: dict[str, Any]) -> object:
        identities = {origin.identity: name for name, origin in self._origins.items()}
        infos = await trio.to_thread.run_sync(self._store.objects)
        return [
            {
                "key": info.version.key,
                "path": _tree_path(identities.get(info.version.origin), info.version.key),
                "source": info.version.origin,
                "bytes": info.present_bytes,
                "size": info.version.size,
                "complete": info.is_complete,
                "pinned": info.is_pinned,
                "last_use": info.last_use,
                "id": info.id,
                "mark": info.attestation_state.name.lower(),
            }
            for info in infos
        ]

    async def _answer_evict(self, request: dict[str, Any]) -> object:
        if request.get("all"):
            chosen = [
                info.id for info in await trio.to_thread.run_sync(self._store.objects) if not info.is_pinned
            ]
        elif "id" in request:
            chosen = [ObjectId(str(request["id"]))]
        else:
            chosen = [version.id for version, _ in self._requested_files(request)]
        skip = bool(request.get("all")) or len(chosen) > 1

        def work() -> dict[str, int]:
            freed = objects = 0
            for object_id in chosen:
                try:
                    got = self._store.evict(object_id)
                except FusecacheError:
                    if not skip:
                        raise
                    continue
                freed += got
                objects += got > 0
            return {"freed": freed, "objects": objects}

        return await trio.to_thread.run_sync(work)

    async def _answer_pin(self, request: dict[str, Any]) -> object:
        pinned = bool(request.get("on", True))
        if "id" in request:
            chosen = [ObjectId(str(request["id"]))]
        else:
            chosen = [version.id for version, _ in self._requested_files(request)]

        def work() -> dict[str, int]:
            for object_id in chosen:
                self._store.set_pinned(object_id, pinned)
            return {"objects": len(chosen)}

        return await trio.to_thread.run_sync(work)

    async def _answer_fetch(self, request: dict[str, Any]) -> object:
        files = self._requested_files(request)

        def work() -> dict[str, int]:
            infos = self._store.objects()
            present = {info.id: info.present_bytes for info in infos}
            shut = (
                {info.id for info in infos if info.attestation_state is AttestationState.QUARANTINED}
                if self._inspector
                else set()
            )
            missing = [
                (version, source) for version, source in files if present.get(version.id, 0) < version.size
            ]
            self._fetch_service.prefetch_files(each for each in missing if each[0].id not in shut)
            if missing and all(version.id in shut for version, _ in missing):
                raise AttestationError(
                    f"{missing[0][0].key} is in quarantine: it is not what its manifest says, see the log"
                )
            done = sum(min(present.get(version.id, 0), version.size) for version, _ in files)
            return {"done": done, "total": sum(version.size for version, _ in files), "files": len(files)}

        return await trio.to_thread.run_sync(work)

    async def _answer_refresh(self, request: dict[str, Any]) -> object:
        await self._catalog.listings.refresh()
        if self._inspector is not None:
            self._inspector.forget_answers()
        return {"files": self._catalog.index.totals[0]}

    async def _answer_drain(self, request: dict[str, Any]) -> object:
        """Stop fetching what nobody waits for, and wait for the reads under way."""
        self._fetch_service.pause_prefetch()
        with trio.move_on_after(_DRAIN_TIMEOUT):
            while self._channel.waiting_read_count:  # noqa: ASYNC110  the readers are answered by threads
                await trio.sleep(0.02)
        return {"waiting": self._channel.waiting_read_count}

    def _requested_files(self, request: dict[str, Any]) -> list[tuple[ObjectVersion, str]]:
        """Versions and sources of the files at or below the request's path."""
        path = request.get("path")
        if not isinstance(path, str):
            raise ConfigError("a path below the mountpoint is needed")
        entry = self._catalog.index.entry_by_path(path.strip("/"))
        if entry is None:
            raise NotFoundError(f"{path}: no such file in this mount")
        return [
            (found.version, found.source)
            for found in _entries_below(self._catalog, entry)
            if found.version is not None
        ]


def _entries_below(catalog: Catalog, entry: Entry) -> Iterable[Entry]:
    if not entry.is_dir:
        yield entry
        return
    for child in catalog.index.children(entry.nodeid):
        yield from _entries_below(catalog, child)


def _tree_path(source: str | None, key: str) -> str | None:
    return None if source is None else f"{source}/{key}" if source else key


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
