"""The operations of the control socket, by which the command line uses the daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import trio

from fusecache.attest.inspector import ManifestInspector
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import Entry
from fusecache.catalog.source_names import SourceNames
from fusecache.control.server import Handler
from fusecache.errors import AttestationError, ConfigError, FusecacheError, NotFoundError
from fusecache.fetch.service import FetchService
from fusecache.peers.node import PeerNode
from fusecache.store.disk.format import AttestationState
from fusecache.store.interface import BlockStore
from fusecache.store.object_item import object_item
from fusecache.types import ObjectId, ObjectVersion

_DRAIN_TIMEOUT = 10.0
"""Seconds that a drain waits, at most, for reads under way."""


class CacheOperations:
    """Lists the objects of the cache, evicts them, pins and unpins them."""

    def __init__(self, catalog: Catalog, source_names: SourceNames, store: BlockStore) -> None:
        self._catalog = catalog
        self._source_names = source_names
        self._store = store

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """Operation -> the function that answers it."""
        return {"ls": self._answer_ls, "evict": self._answer_evict, "pin": self._answer_pin}

    async def _answer_ls(self, request: dict[str, Any]) -> object:
        infos = await trio.to_thread.run_sync(self._store.objects)
        return [object_item(info, path=self._source_names.tree_path(info.version)) for info in infos]

    async def _answer_evict(self, request: dict[str, Any]) -> object:
        if request.get("all"):
            infos = await trio.to_thread.run_sync(self._store.objects)
            chosen = [info.id for info in infos if not info.is_pinned]
        else:
            chosen = self._requested_ids(request)
        skips_refusals = bool(request.get("all")) or len(chosen) > 1

        def evict_chosen() -> dict[str, int]:
            freed = objects = 0
            for object_id in chosen:
                try:
                    nbytes = self._store.evict(object_id)
                except FusecacheError:
                    if not skips_refusals:
                        raise
                    continue
                freed += nbytes
                objects += nbytes > 0
            return {"freed": freed, "objects": objects}

        return await trio.to_thread.run_sync(evict_chosen)

    async def _answer_pin(self, request: dict[str, Any]) -> object:
        is_pinned = bool(request.get("on", True))
        chosen = self._requested_ids(request)

        def pin_chosen() -> dict[str, int]:
            for object_id in chosen:
                self._store.set_pinned(object_id, is_pinned)
            return {"objects": len(chosen)}

        return await trio.to_thread.run_sync(pin_chosen)

    def _requested_ids(self, request: dict[str, Any]) -> list[ObjectId]:
        if "id" in request:
            return [ObjectId(str(request["id"]))]
        return [version.id for version, _ in requested_versions(self._catalog, request)]


class FetchOperations:
    """Fetching files without a reader, listing the sources anew, and coming to rest."""

    def __init__(
        self,
        catalog: Catalog,
        store: BlockStore,
        fetch_service: FetchService,
        *,
        inspector: ManifestInspector | None,
        count_waiting_reads: Callable[[], int],
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._fetch_service = fetch_service
        self._inspector = inspector
        self._count_waiting_reads = count_waiting_reads

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """Operation -> the function that answers it."""
        return {"fetch": self._answer_fetch, "refresh": self._answer_refresh, "drain": self._answer_drain}

    async def _answer_fetch(self, request: dict[str, Any]) -> object:
        files = requested_versions(self._catalog, request)
        return await trio.to_thread.run_sync(self._fetch_missing, files)

    def _fetch_missing(self, files: list[tuple[ObjectVersion, str]]) -> dict[str, int]:
        infos = self._store.objects()
        present = {info.id: info.present_bytes for info in infos}
        quarantined: set[ObjectId] = set()
        if self._inspector is not None:
            quarantined = {
                info.id for info in infos if info.attestation_state is AttestationState.QUARANTINED
            }
        missing = [
            (version, source) for version, source in files if present.get(version.id, 0) < version.size
        ]
        self._fetch_service.dispatcher.plan_files(file for file in missing if file[0].id not in quarantined)
        if missing and all(version.id in quarantined for version, _ in missing):
            raise AttestationError(
                f"{missing[0][0].key} is in quarantine: it is not what its manifest says, see the log"
            )
        done = sum(min(present.get(version.id, 0), version.size) for version, _ in files)
        return {"done": done, "total": sum(version.size for version, _ in files), "files": len(files)}

    async def _answer_refresh(self, request: dict[str, Any]) -> object:
        await self._catalog.listings.refresh()
        if self._inspector is not None:
            self._inspector.forget_answers()
        return {"files": self._catalog.index.totals[0]}

    async def _answer_drain(self, request: dict[str, Any]) -> object:
        """Stop fetching ahead, and wait for the reads under way."""
        self._fetch_service.dispatcher.pause_prefetch()
        with trio.move_on_after(_DRAIN_TIMEOUT):
            while self._count_waiting_reads():  # noqa: ASYNC110  the readers are answered by threads
                await trio.sleep(0.02)
        return {"waiting": self._count_waiting_reads()}


def make_peers_handler(peer_node: PeerNode | None) -> Handler:
    """Returns the function that answers the operation `peers`."""

    async def answer_peers(request: dict[str, Any]) -> object:
        if peer_node is None:
            raise ConfigError("this mount is no node of a cluster: see peers.discovery")
        return await peer_node.report()

    return answer_peers


def requested_versions(catalog: Catalog, request: dict[str, Any]) -> list[tuple[ObjectVersion, str]]:
    """Versions and sources of the files at or below the request's "path". Raises ConfigError and NotFoundError."""
    path = request.get("path")
    if not isinstance(path, str):
        raise ConfigError("a path below the mountpoint is needed")
    entry = catalog.index.entry_by_path(path.strip("/"))
    if entry is None:
        raise NotFoundError(f"{path}: no such file in this mount")
    return [
        (found.version, found.source) for found in _entries_below(catalog, entry) if found.version is not None
    ]


def _entries_below(catalog: Catalog, entry: Entry) -> Iterable[Entry]:
    if not entry.is_dir:
        yield entry
        return
    for child in catalog.index.children(entry.nodeid):
        yield from _entries_below(catalog, child)
