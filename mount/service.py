"""What the daemon tells and does for the command line: the operations of the control socket."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from fusecache.attest.inspector import Inspector
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import Entry
from fusecache.cluster.cluster import Cluster
from fusecache.config.model import MountConfig
from fusecache.errors import AttestationError, ConfigError, FusecacheError, NotFoundError
from fusecache.loader.loader import Loader
from fusecache.mount.channel import Channel
from fusecache.mount.handles import Handles
from fusecache.mount.tracing import Tracing
from fusecache.origin.base import Origin
from fusecache.store.format import Mark
from fusecache.store.interface import BlockStore
from fusecache.store.orders import Orders
from fusecache.types import ObjectId, ObjectVersion

_DRAIN = 10.0
"""Most seconds that a drain waits for reads under way."""


@dataclass
class Facts:
    """What the keeper told."""

    restarts: int
    keeper_pid: int
    started: float


class Service:
    """The parts of one daemon, seen from outside. `handlers` is for fusecache.control.serve."""

    def __init__(
        self,
        config: MountConfig,
        facts: Facts,
        *,
        catalog: Catalog,
        origins: Mapping[str, Origin],
        store: BlockStore,
        loader: Loader,
        handles: Handles,
        channel: Channel,
        tracing: Tracing,
        cluster: Cluster | None = None,
        orders: Orders,
        inspector: Inspector | None = None,
    ) -> None:
        self._orders = orders
        self._config = config
        self._facts = facts
        self._catalog = catalog
        self._origins = origins
        self._store = store
        self._loader = loader
        self._handles = handles
        self._channel = channel
        self._tracing = tracing
        self._cluster = cluster
        self._inspector = inspector

    @property
    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], Awaitable[object]]]:
        """Operation -> what answers it."""
        return {
            "status": self._status,
            "ls": self._ls,
            "evict": self._evict,
            "pin": self._pin,
            "refresh": self._refresh,
            "drain": self._drain,
            "fetch": self._fetch,
            "peers": self._peers,
            "trace": self._tracing.start,
        }

    # -- status

    def status(self) -> dict[str, Any]:
        """The whole status; may take a while on a store of very many objects. Thread-safe."""
        reads, opens, usage = self._channel.stats, self._handles.stats, self._store.usage()
        passthrough = self._handles.passthrough
        progress = self._loader.progress()
        origins = self._origins.values()
        files, size = self._catalog.totals
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
            "mode": {"now": "passthrough" if passthrough.active else "daemon", "why": passthrough.why},
            "bytes": {
                "store": reads.bytes_store,
                "peer": self._cluster.exchange.stats.bytes_peers if self._cluster is not None else 0,
                "origin": sum(origin.stats.bytes for origin in origins),
            },
            "opens": {"passthrough": opens.passthrough, "daemon": opens.daemon},
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
                **{f"pace_{name}": pace for name, pace in vars(self._store.paces()).items()},
            },
            "origin": {
                name: sum(getattr(origin.stats, name) for origin in origins)
                for name in ("requests", "errors", "throttled", "retries", "lists", "bytes", "concurrency")
            },
            "loader": {
                **progress,
                "waiting": self._channel.waiting,
                "flights": self._loader.stats.flights,
                "flights_failed": self._loader.stats.flights_failed,
                "bytes_uncached": self._loader.stats.bytes_uncached,
            },
            "orders": {
                "stored": self._orders.count(),
                "replaying": progress["replaying"],
                **vars(self._loader.learning.stats),
            },
            **({"manifest": vars(self._inspector.stats)} if self._inspector is not None else {}),
            **({"peers": self._cluster.counters()} if self._cluster is not None else {}),
            "reads": {"answered": reads.reads, "waited_bytes": reads.bytes_fetched, "failed": reads.errors},
            "errors": {"reads": reads.errors},
            "tracing": self._tracing.running,
            "catalog": {"files": files, "bytes": size, "age": self._catalog.age},
            "process": {
                "pid": os.getpid(),
                "rss": _rss(),
                "cpu_seconds": time.process_time(),
                "uptime": time.monotonic() - self._facts.started,
                "keeper_pid": self._facts.keeper_pid,
                "restarts": self._facts.restarts,
            },
        }

    async def _status(self, request: dict[str, Any]) -> object:
        return await trio.to_thread.run_sync(self.status)

    async def _peers(self, request: dict[str, Any]) -> object:
        if self._cluster is None:
            raise ConfigError("this mount is no node of a cluster: see peers.discovery")
        return await self._cluster.report()

    # -- the cache

    async def _ls(self, request: dict[str, Any]) -> object:
        identities = {origin.identity: name for name, origin in self._origins.items()}
        infos = await trio.to_thread.run_sync(self._store.objects)
        return [
            {
                "key": info.version.key,
                "path": _path(identities.get(info.version.origin), info.version.key),
                "source": info.version.origin,
                "bytes": info.present_bytes,
                "size": info.version.size,
                "complete": info.complete,
                "pinned": info.pinned,
                "last_use": info.last_use,
                "id": info.id,
                "mark": info.mark.name.lower(),
            }
            for info in infos
        ]

    async def _evict(self, request: dict[str, Any]) -> object:
        if request.get("all"):
            chosen = [
                info.id for info in await trio.to_thread.run_sync(self._store.objects) if not info.pinned
            ]
        elif "id" in request:
            chosen = [ObjectId(str(request["id"]))]
        else:
            chosen = [version.id for version, _ in self._files(request)]
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

    async def _pin(self, request: dict[str, Any]) -> object:
        pinned = bool(request.get("on", True))
        if "id" in request:
            chosen = [ObjectId(str(request["id"]))]
        else:
            chosen = [version.id for version, _ in self._files(request)]

        def work() -> dict[str, int]:
            for object_id in chosen:
                self._store.pin(object_id, pinned)
            return {"objects": len(chosen)}

        return await trio.to_thread.run_sync(work)

    async def _fetch(self, request: dict[str, Any]) -> object:
        files = self._files(request)

        def work() -> dict[str, int]:
            infos = self._store.objects()
            present = {info.id: info.present_bytes for info in infos}
            shut = {info.id for info in infos if info.mark is Mark.QUARANTINED} if self._inspector else set()
            missing = [
                (version, source) for version, source in files if present.get(version.id, 0) < version.size
            ]
            self._loader.want(each for each in missing if each[0].id not in shut)
            if missing and all(version.id in shut for version, _ in missing):
                raise AttestationError(
                    f"{missing[0][0].key} is in quarantine: it is not what its manifest says, see the log"
                )
            done = sum(min(present.get(version.id, 0), version.size) for version, _ in files)
            return {"done": done, "total": sum(version.size for version, _ in files), "files": len(files)}

        return await trio.to_thread.run_sync(work)

    async def _refresh(self, request: dict[str, Any]) -> object:
        await self._catalog.refresh()
        if self._inspector is not None:
            self._inspector.forget()
        return {"files": self._catalog.totals[0]}

    async def _drain(self, request: dict[str, Any]) -> object:
        """Stop fetching what nobody waits for, and wait for the reads under way."""
        self._loader.pause()
        with trio.move_on_after(_DRAIN):
            while self._channel.waiting:  # noqa: ASYNC110  the readers are answered by threads
                await trio.sleep(0.02)
        return {"waiting": self._channel.waiting}

    def _files(self, request: dict[str, Any]) -> list[tuple[ObjectVersion, str]]:
        """Versions and sources of the files at or below the request's path."""
        path = request.get("path")
        if not isinstance(path, str):
            raise ConfigError("a path below the mountpoint is needed")
        entry = self._catalog.find(path.strip("/"))
        if entry is None:
            raise NotFoundError(f"{path}: no such file in this mount")
        return [
            (found.version, found.source)
            for found in _below(self._catalog, entry)
            if found.version is not None
        ]


def _below(catalog: Catalog, entry: Entry) -> Iterable[Entry]:
    if not entry.is_dir:
        yield entry
        return
    for child in catalog.children(entry.nodeid):
        yield from _below(catalog, child)


def _path(source: str | None, key: str) -> str | None:
    return None if source is None else f"{source}/{key}" if source else key


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
