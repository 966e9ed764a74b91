"""Builds a node of its parts, for the daemon of a mount and for `fusecache serve`: the one place that knows the order.

Every part is complete when its constructor returns, and gets what it needs as an argument. A part that is built later
and has to hear of an earlier one subscribes to the EventHub, which is built first:

    events - origins - peer directory - store - catalog (mount) - block source - fetch service - prefetcher (mount) -
    inspector - peer node
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import trio

from fusecache.attest.digests import UNSIGNED, ExpectedDigests
from fusecache.attest.inspector import ManifestInspector
from fusecache.attest.manifests import is_manifest
from fusecache.attest.signing import ManifestKey
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import CatalogSource
from fusecache.catalog.source_names import SourceNames
from fusecache.config.model import MountConfig
from fusecache.errors import ConfigError, NotFoundError
from fusecache.events import EventHub
from fusecache.fetch.attestation_queue import AttestationQueue
from fusecache.fetch.block_source import OriginBlockSource
from fusecache.fetch.service import FetchService
from fusecache.fetch.settings import FetchSettings
from fusecache.origin.factory import open_origin
from fusecache.origin.interface import Origin
from fusecache.peers.directory import PeerDirectory
from fusecache.peers.exchange.block_source import PeerBlockSource
from fusecache.peers.node import PeerNode, make_block_source
from fusecache.peers.profiles import PeerProfiles
from fusecache.prefetch.interface import PrefetchSettings
from fusecache.prefetch.prefetcher import Prefetcher
from fusecache.prefetch.profile_keeper import ProfileStats
from fusecache.prefetch.profiles.access_profile import MAX_BYTES, check_profile
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.store.attestation import AttestationPolicy
from fusecache.store.factory import open_store
from fusecache.store.interface import BlockStore
from fusecache.telemetry.metrics import StatusCollector
from fusecache.telemetry.server import render_metrics
from fusecache.types import ObjectVersion

_PREFETCH_BUDGET_SHARE = 0.8
"""Share of the cache that the shards fetched ahead may take where no budget is set."""

Role = Literal["mount", "serve"]


@dataclass(frozen=True)
class Node:
    """The parts of a running node."""

    config: MountConfig
    events: EventHub
    origins: Mapping[str, Origin]
    """Name of the source -> its origin."""
    source_names: SourceNames
    store: BlockStore
    fetch_service: FetchService
    profile_store: ProfileStore
    profile_stats: ProfileStats
    """Of the prefetcher; all 0 where nothing is mounted."""
    catalog: Catalog | None
    """None where nothing is mounted."""
    inspector: ManifestInspector | None
    """None without verify=manifest."""
    peer_node: PeerNode | None
    """None where peers are off."""

    @property
    def mounted_catalog(self) -> Catalog:
        """The catalog of a node that was built for a mount."""
        assert self.catalog is not None
        return self.catalog


@contextlib.asynccontextmanager
async def build_node(
    config: MountConfig,
    role: Role,
    build_status: Callable[[], Mapping[str, Any]],
    *,
    keep_contents: bool = False,
    observed_read_ahead: int = 0,
) -> AsyncIterator[Node]:
    """The node, which fetches while this is entered; it takes no part in its cluster before `run_peer_node`.

    `build_status` is called from then on, in threads, for GET /metrics. With `keep_contents` the store takes over what
    an earlier daemon of the same mount left in memory. `observed_read_ahead` is how many bytes the kernel reads ahead
    in files whose readers the prefetcher observes. For a mount this waits for the first listing of each source. Raises
    ConfigError, OriginError and StoreError, in one line.
    """
    with contextlib.ExitStack() as stack:
        events = EventHub()
        origins = stack.enter_context(_open_origins(config))
        source_names = SourceNames({origin.identity: name for name, origin in origins.items()})
        key = _read_manifest_key(config) if config.verify == "manifest" else None
        directory = _make_peer_directory(config, events)
        if directory is not None:
            stack.callback(directory.close)
        store = stack.enter_context(
            open_store(
                config,
                keep_objects=keep_contents,
                attestation_policy=_attestation_policy(config, key),
                is_spare=None if directory is None else directory.coverage.is_kept_elsewhere,
            )
        )
        catalog = await _start_catalog(config, origins, events) if role == "mount" else None
        profile_store = ProfileStore(config.cache_dir)
        peer_source: PeerBlockSource | None = None
        peer_profiles: PeerProfiles | None = None
        if directory is not None:
            peer_source = make_block_source(
                config.peers, directory, origins, concurrency=config.tuning.concurrency
            )
            peer_profiles = _make_peer_profiles(directory, profile_store)

        attestation_queue = AttestationQueue() if config.verify == "manifest" else None
        fetch_service = stack.enter_context(
            FetchService(
                store,
                OriginBlockSource(origins) if peer_source is None else peer_source,
                _fetch_settings(config, role),
                events=events,
                attestation_queue=attestation_queue,
            )
        )
        profile_stats = ProfileStats()
        if catalog is not None:
            settings = _prefetch_settings(config, observed_read_ahead)
            prefetcher = Prefetcher(fetch_service, catalog.index, settings, profile_store, peer_profiles)
            profile_stats = prefetcher.stats
        inspector: ManifestInspector | None = None
        if attestation_queue is not None:
            digests = ExpectedDigests(
                _make_object_finder(origins, source_names, catalog),
                functools.partial(read_whole_object, fetch_service),
                _make_metadata_reader(origins),
                key,
            )
            inspector = ManifestInspector(digests, fetch_service, attestation_queue)
        peer_node: PeerNode | None = None
        if directory is not None and peer_source is not None:
            stack.callback(directory.close)  # before the fetch service, whose flights wait for other nodes
            collector = StatusCollector(build_status)
            peer_node = PeerNode(
                config.peers,
                directory,
                store=store,
                origins=origins,
                block_source=peer_source,
                fetch_service=fetch_service,
                peer_profiles=peer_profiles,
                render_metrics=functools.partial(render_metrics, collector),
            )
        if inspector is not None:
            inspector.start()
            stack.callback(inspector.close)
        yield Node(
            config=config,
            events=events,
            origins=origins,
            source_names=source_names,
            store=store,
            fetch_service=fetch_service,
            profile_store=profile_store,
            profile_stats=profile_stats,
            catalog=catalog,
            inspector=inspector,
            peer_node=peer_node,
        )


async def run_peer_node(node: Node, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Take part in the cluster until cancelled; returns at once where peers are off. Raises ConfigError when the
    address to serve at can't be had."""
    if node.peer_node is None:
        task_status.started()
        return
    await node.peer_node.run(task_status=task_status)


def read_whole_object(fetch_service: FetchService, version: ObjectVersion, source: str) -> bytes:
    """All bytes of an object, by way of the store. Blocks for the origin. Raises FusecacheError."""
    object_fetch = fetch_service.open_object(version, source)
    try:
        return fetch_service.read_bytes(object_fetch, 0, version.size)
    finally:
        fetch_service.release_fetch(object_fetch)


@contextlib.contextmanager
def _open_origins(config: MountConfig) -> Iterator[dict[str, Origin]]:
    with contextlib.ExitStack() as stack:
        origins: dict[str, Origin] = {}
        for source in config.sources:
            origins[source.name] = open_origin(source, config.tuning)
            stack.callback(origins[source.name].close)
        yield origins


async def _start_catalog(config: MountConfig, origins: Mapping[str, Origin], events: EventHub) -> Catalog:
    catalog = Catalog(
        [
            CatalogSource(name, origin.identity, origin.list_objects, origin.stat_object)
            for name, origin in origins.items()
        ],
        ttl=config.metadata_ttl,
        negative_ttl=config.negative_ttl,
        snapshot_dir=config.cache_dir / "listings",
        events=events,
    )
    await catalog.listings.start()
    return catalog


def _fetch_settings(config: MountConfig, role: Role) -> FetchSettings:
    return FetchSettings(
        concurrency=config.tuning.concurrency,
        range_bytes=config.tuning.range_size,
        deadline=config.tuning.deadline,
        prefetch=role == "mount" and config.prefetch == "auto",
    )


def _prefetch_settings(config: MountConfig, observed_read_ahead: int) -> PrefetchSettings:
    budget = config.prefetch_budget
    if budget is None:
        budget = int(config.weights_limit_bytes() * _PREFETCH_BUDGET_SHARE)
    return PrefetchSettings(
        is_enabled=config.prefetch == "auto",
        budget=budget,
        learn=config.learn == "auto",
        read_ahead=observed_read_ahead,
    )


def _make_peer_directory(config: MountConfig, events: EventHub) -> PeerDirectory | None:
    if not config.peers.is_enabled:
        return None
    return PeerDirectory(
        config.peers, weight=config.weights_limit_bytes(), block_size=config.block_size, events=events
    )


def _make_peer_profiles(directory: PeerDirectory, profile_store: ProfileStore) -> PeerProfiles:
    return PeerProfiles(
        directory.name,
        directory.members,
        directory.client,
        profile_files=profile_store,
        check_profile=check_profile,
        max_bytes=MAX_BYTES,
    )


# -- attestation


def _read_manifest_key(config: MountConfig) -> ManifestKey | None:
    if config.manifest_key is None:
        return None
    try:
        return ManifestKey(config.manifest_key.read_bytes())
    except OSError as error:
        raise ConfigError(f"manifest_key {config.manifest_key}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"manifest_key {config.manifest_key} {error}") from None


def _attestation_policy(config: MountConfig, key: ManifestKey | None) -> AttestationPolicy | None:
    if config.verify != "manifest":
        return None
    return AttestationPolicy(UNSIGNED if key is None else key.anchor, is_manifest)


def _make_object_finder(
    origins: Mapping[str, Origin], source_names: SourceNames, catalog: Catalog | None
) -> Callable[[ObjectVersion, str], ObjectVersion | None]:
    """Returns a function that finds another object, by its key, in the source of a version."""

    def find_in_origin(version: ObjectVersion, key: str) -> ObjectVersion | None:
        source = source_names.source_of(version)
        if source is None:
            return None
        try:
            return origins[source].stat_object(key)
        except NotFoundError:
            return None

    return find_in_origin if catalog is None else catalog.index.find_object


def _make_metadata_reader(
    origins: Mapping[str, Origin],
) -> Callable[[ObjectVersion, str], bytes | None]:
    def read_metadata_sha256(version: ObjectVersion, source: str) -> bytes | None:
        return origins[source].read_metadata_sha256(version)

    return read_metadata_sha256
