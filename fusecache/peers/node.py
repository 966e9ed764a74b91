"""One node's part in its cluster: it serves blocks to the others, and finds out which of them are alive."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import trio

from fusecache.config.peer_settings import PeerSettings, is_loopback, split_address
from fusecache.errors import ConfigError
from fusecache.fetch.service import FetchService
from fusecache.origin.interface import Origin
from fusecache.peers.directory import PeerDirectory
from fusecache.peers.exchange.block_service import BlockService
from fusecache.peers.exchange.block_source import PeerBlockSource
from fusecache.peers.exchange.state import make_exchange_state
from fusecache.peers.membership.discovery import Discovery, DnsDiscovery, StaticDiscovery
from fusecache.peers.membership.etcd import EtcdDiscovery
from fusecache.peers.membership.http_probe import HttpProbe
from fusecache.peers.membership.probes import MembershipProber
from fusecache.peers.profiles import PeerProfiles
from fusecache.peers.transport.server import PeerServer
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId

_log = logging.getLogger(__name__)

PEER_WORKERS = 64
"""Requests to other nodes at a time: enough to follow all stripes that come from the origin
(policy.MAX_CLUSTER_ORIGIN_REQUESTS), and no more memory than a buffer each."""
_COVERAGE_EVERY = 20.0
"""Seconds between polls of what the other nodes have, while that matters."""
_NODES_POLLED_PER_SECOND = 5
"""Nodes per second, on average: in a large cluster the polls are farther apart."""
_NEARLY_FULL = 0.8


def make_block_source(
    settings: PeerSettings, directory: PeerDirectory, origins: Mapping[str, Origin], *, concurrency: int
) -> PeerBlockSource:
    """Where a node of a cluster gets its blocks from; `concurrency`: requests to the origin at a time, at most."""
    state = make_exchange_state(
        directory.name, directory.members, directory.outgoing, stripe_bytes=settings.stripe
    )
    return PeerBlockSource(
        state,
        directory.client,
        origins,
        peer_workers=PEER_WORKERS,
        concurrency=concurrency,
        fallback_requests=settings.fallback,
        stores_remote=settings.local_copies == "all",
    )


class PeerNode:
    """A node that takes part in its cluster while `run` runs. The store was given the directory, the fetch service the
    block source. `render_metrics` makes the page that GET /metrics shows; it is called in a thread.

    All that it keeps itself is where it is reached, which is final once the server listens.
    """

    def __init__(
        self,
        settings: PeerSettings,
        directory: PeerDirectory,
        *,
        store: BlockStore,
        origins: Mapping[str, Origin],
        block_source: PeerBlockSource,
        fetch_service: FetchService,
        peer_profiles: PeerProfiles | None,
        render_metrics: Callable[[], str],
    ) -> None:
        """Raises ConfigError when it is to serve, and can't tell the others where."""
        self._settings = settings
        self._directory = directory
        self._store = store
        self._fetch_service = fetch_service
        self._own_url = self._find_own_url()
        """Where others reach this node; None: it does not serve."""
        self.block_source = block_source
        self._block_service = BlockService(
            get_node_info=directory.own_info,
            state=block_source.state,
            fetch_service=fetch_service,
            store=store,
            source_by_identity={origin.identity: name for name, origin in origins.items()},
            streams=settings.streams,
            render_metrics=render_metrics,
            peer_profiles=peer_profiles,
        )

    def _find_own_url(self) -> str | None:
        settings = self._settings
        if not settings.listen:
            return None
        if settings.advertise:
            return settings.advertise
        host, port = split_address(settings.listen)
        if host in ("", "0.0.0.0", "::"):  # noqa: S104  what was configured
            host = _own_address_towards(settings)
        if ":" in host:
            host = f"[{host}]"
        scheme = "http" if self._directory.credentials.server_tls is None else "https"
        return f"{scheme}://{host}:{port}"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled; started once it is known which nodes are there, or after some seconds. Raises
        ConfigError when the address to serve at can't be had."""
        directory = self._directory
        async with trio.open_nursery() as nursery, HttpProbe(directory.credentials.client_tls) as probe:
            if self._own_url is not None:
                await self._serve_peers(nursery)
            members_changed = trio.Event()

            def on_members_changed() -> None:
                members_changed.set()

            directory.members.join(self._own_url)
            directory.members_changed.subscribe(on_members_changed)
            prober = MembershipProber(directory.members, self._make_discovery(), probe)
            await nursery.start(prober.run)
            nursery.start_soon(self._poll_coverage_when_nearly_full)
            await trio.to_thread.run_sync(self._fetch_service.update_routes)
            task_status.started()
            while True:
                await members_changed.wait()
                members_changed = trio.Event()
                await trio.to_thread.run_sync(self._fetch_service.update_routes)

    async def _serve_peers(self, nursery: trio.Nursery) -> None:
        settings, credentials = self._settings, self._directory.credentials
        host, port = split_address(settings.listen)
        server = PeerServer(
            self._block_service,
            host,
            port,
            connections=settings.connections,
            verifier=credentials.verifier,
            tls=credentials.server_tls,
            congestion=settings.congestion,
        )
        nursery.start_soon(self._block_service.close_idle_fetches)
        bound_port: int = await nursery.start(server.run)
        if port == 0 and not settings.advertise:
            self._own_url = str(self._own_url).rpartition(":")[0] + f":{bound_port}"
        _log.info("serving blocks to other nodes at %s as %s", self._own_url, settings.node)

    def _make_discovery(self) -> Discovery:
        settings = self._settings
        if settings.discovery == "dns":
            host, port = split_address(settings.dns)
            return DnsDiscovery(
                host, port, "http" if self._directory.credentials.client_tls is None else "https"
            )
        if settings.discovery == "etcd":
            own_entry = None if self._own_url is None else {"name": settings.node, "url": self._own_url}
            instance = self._directory.own_info().instance
            return EtcdDiscovery(settings.etcd, settings.etcd_prefix, own_entry, instance=instance)
        return StaticDiscovery(settings.members)

    async def _poll_coverage_when_nearly_full(self) -> None:
        """Until cancelled, keep asking the other nodes what they have while room in the store is short: what another
        node keeps is evicted first."""
        while True:
            usage = await trio.to_thread.run_sync(self._store.usage)
            if usage.fullness > _NEARLY_FULL:
                await self._directory.coverage.poll()
            members = self._directory.members.members()
            await trio.sleep(max(_COVERAGE_EVERY, len(members) / _NODES_POLLED_PER_SECOND))

    # -- seeing it

    async def report(self) -> dict[str, Any]:
        """Everything that `fusecache peers` shows. Asks the other nodes what they have, for some seconds at most."""
        await self._directory.coverage.poll()
        return {
            "node": self._settings.node,
            "url": self._own_url,
            "discovery": self._settings.discovery,
            "tenant": self._settings.tenant,
            "members": await trio.to_thread.run_sync(self._member_rows),
            "coverage": await trio.to_thread.run_sync(self._coverage_rows),
            **self.counters(),
        }

    def _member_rows(self) -> list[dict[str, Any]]:
        shares, exchange = self._directory.weight_shares(), self.block_source.state
        rows = []
        for state in self._directory.members.member_states():
            traffic = exchange.traffic.node_counters(state.name)
            reason, bad_blocks = exchange.breaker.describe_node(state.name)
            rows.append(
                {
                    **vars(state),
                    "avoided": reason,
                    "share": shares.get(state.name, 0.0) if state.state == "alive" else 0.0,
                    "bytes_in": traffic.bytes_in,
                    "bytes_out": traffic.bytes_out,
                    "requests": traffic.requests,
                    "errors": traffic.errors,
                    "bad_blocks": bad_blocks,
                    "first_byte": traffic.first_byte_seconds,
                    "bytes_per_second": exchange.speeds.stored_rate(state.name),
                }
            )
        return rows

    def _coverage_rows(self) -> list[dict[str, Any]]:
        """Bytes of each of this node's objects per node."""
        found: dict[ObjectId, dict[str, Any]] = {}
        for info in self._store.objects():
            found[info.id] = {
                "id": info.id,
                "source": info.version.origin,
                "key": info.version.key,
                "size": info.version.size,
                "nodes": {self._settings.node: info.present_bytes},
            }
        for name, objects in self._directory.coverage.bytes_by_node.items():
            for object_id, nbytes in objects.items():
                if object_id in found:
                    found[object_id]["nodes"][name] = nbytes
        return sorted(found.values(), key=lambda item: (item["source"], item["key"]))

    def counters(self) -> dict[str, Any]:
        """Figures of what this node gets from others and gives to them; quick, from any thread."""
        traffic, service = self.block_source.state.traffic, self._block_service
        stats = traffic.stats
        peers = list(stats.traffic_by_node.values())
        return {
            "bytes_in": stats.bytes_from_peers,
            "bytes_out": sum(counters.bytes_out for counters in peers),
            "bad_blocks": sum(counters.bad_blocks for counters in peers),
            "errors": sum(counters.errors for counters in peers),
            "fallbacks": stats.fallbacks,
            "redirected": stats.redirects,
            "hedged": stats.hedges,
            "busy": stats.busy_answers,
            "refused": service.refused_requests,
            "sending": service.responses_in_progress,
            "queued": service.queued_requests,
            "receiving": traffic.transfers_in_progress,
            "pace": traffic.peak_throughput(),
            "nodes": len(self._directory.members.members()),
        }


def _own_address_towards(settings: PeerSettings) -> str:
    """The address of this machine from which it would reach the others. Raises ConfigError."""
    targets = [urlsplit(url) for url in (*settings.members, *settings.etcd)]
    hosts = [(target.hostname or "", target.port or 80) for target in targets]
    if settings.dns:
        hosts.append(split_address(settings.dns))
    for host, port in hosts:
        if is_loopback(host):
            continue
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing
                return str(probe.getsockname()[0])
        except OSError:
            continue
    if hosts and all(is_loopback(host) for host, _ in hosts):
        return "127.0.0.1"
    raise ConfigError(
        f"peers.listen={settings.listen}: the address other nodes reach this one at is unknown: set peers.advertise"
    )
