"""One node's part in its cluster: membership, the server, the client, and what they know of each other."""

from __future__ import annotations

import functools
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import trio

import fusecache
from fusecache.config.peer_settings import PeerSettings, is_loopback, split_address
from fusecache.errors import ConfigError, FusecacheError
from fusecache.fetch.service import FetchService
from fusecache.peers.exchange.block_service import BlockService
from fusecache.peers.exchange.block_source import PeerBlockSource
from fusecache.peers.exchange.outgoing import OutgoingBytes
from fusecache.peers.member import PROTOCOL, NodeInfo
from fusecache.peers.membership.candidate import HttpProbe
from fusecache.peers.membership.discovery import Discovery, DnsDiscovery, StaticDiscovery
from fusecache.peers.membership.etcd import EtcdDiscovery
from fusecache.peers.membership.placement import rank_members
from fusecache.peers.membership.probes import Membership
from fusecache.peers.profiles import PeerProfiles
from fusecache.peers.transport.auth import (
    RequestSigner,
    RequestVerifier,
    load_shared_secret,
    make_client_tls,
    make_server_tls,
)
from fusecache.peers.transport.client import PeerClient
from fusecache.peers.transport.server import PeerServer
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId

if TYPE_CHECKING:
    from fusecache.origin.interface import Origin

_log = logging.getLogger(__name__)

PEER_WORKERS = 64
"""Requests to other nodes at a time: enough to follow all stripes that come from the origin (choice.ORIGIN_REQUESTS),
and no more memory than a buffer each."""
_COVERAGE_EVERY = 20.0
"""Seconds between looks at what the other nodes have, while that matters."""
_NODES_POLLED_PER_SECOND = 5
"""Nodes per second, on average: in a large cluster the looks are farther apart."""
_COVERAGE_TIMEOUT = 5.0
_NEARLY_FULL = 0.8


class PeerNode:
    """Make it, give the loader its `exchange` as supplier, then `run` it. Raises ConfigError."""

    def __init__(
        self,
        settings: PeerSettings,
        store: BlockStore,
        origins: Mapping[str, Origin],
        *,
        concurrency: int,
        weight: int,
    ) -> None:
        self._settings = settings
        self._store = store
        self._origins = origins
        self.render_metrics: Callable[[], str] = lambda: ""
        """The page that GET /metrics shows. Called in a thread."""
        self._instance_id = secrets.token_hex(8)
        self._weight = max(1, settings.weight or weight)
        secret = load_shared_secret(settings)
        self._server_tls, tls = make_server_tls(settings), make_client_tls(settings)
        self._client_tls = tls
        self._verifier = None if secret is None else RequestVerifier(secret, settings.tenant)
        signer = None if secret is None else RequestSigner(secret, settings.node, settings.tenant)
        self._client = PeerClient(
            settings.node,
            signer=signer,
            tls=tls,
            connect_timeout=settings.timeout,
            receive_window=store.block_size,
        )
        self._url = self._find_own_url()
        self._coverage: dict[str, dict[ObjectId, int]] = {}
        """Node -> object -> bytes, as last seen."""
        self._members = _LateMembership()
        self._outgoing = OutgoingBytes()
        self.block_source = PeerBlockSource(
            settings.node,
            self._members,
            self._client,
            origins,
            stripe_bytes=settings.stripe,
            peer_workers=PEER_WORKERS,
            concurrency=concurrency,
            fallback_requests=settings.fallback,
            outgoing=self._outgoing,
            stores_remote=settings.local_copies == "all",
        )
        self._block_service: BlockService | None = None
        self._peer_profiles: PeerProfiles | None = None
        store.is_spare = self._is_spare

    def share_profiles(self, profile_store: ProfileStore) -> PeerProfiles:
        """Give recordings on this shelf to other nodes, and put there what they have; before `run`."""
        self._peer_profiles = PeerProfiles(self._settings.node, self._members, self._client, profile_store)
        return self._peer_profiles

    def _find_own_url(self) -> str | None:
        """Where others reach this node; None: it does not serve. Raises ConfigError."""
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
        return f"{'https' if self._server_tls else 'http'}://{host}:{port}"

    def node_info(self) -> NodeInfo:
        """What this node says of itself."""
        return NodeInfo(
            self._settings.node,
            self._instance_id,
            self._weight,
            self._settings.tenant,
            PROTOCOL,
            fusecache.__version__,
            time.time(),
        )

    async def run(
        self, fetch_service: FetchService, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take part until cancelled; started once it is known who is there, or after some seconds. Raises ConfigError
        when the address to serve at can't be had."""
        async with trio.open_nursery() as nursery, HttpProbe(self._client_tls) as probe:
            if self._url is not None:
                await self._serve_peers(fetch_service, nursery)
            changed = trio.Event()

            def on_change() -> None:
                changed.set()

            membership = Membership(
                self.node_info(), self._url, self._make_discovery(), probe, on_members_changed=on_change
            )
            self._members.membership = membership
            await nursery.start(membership.run)
            nursery.start_soon(self._poll_coverage_when_needed)
            await trio.to_thread.run_sync(fetch_service.update_routes)
            task_status.started()
            while True:
                await changed.wait()
                changed = trio.Event()
                await trio.to_thread.run_sync(fetch_service.update_routes)

    async def _serve_peers(self, fetch_service: FetchService, nursery: trio.Nursery) -> None:
        settings = self._settings
        self._block_service = BlockService(
            self.node_info,
            self._members,
            self.block_source,
            fetch_service,
            self._store,
            {origin.identity: name for name, origin in self._origins.items()},
            outgoing=self._outgoing,
            streams=settings.streams,
            render_metrics=lambda: self.render_metrics(),
            peer_profiles=self._peer_profiles,
        )
        host, port = split_address(settings.listen)
        server = PeerServer(
            self._block_service,
            host,
            port,
            connections=settings.connections,
            verifier=self._verifier,
            tls=self._server_tls,
            congestion=settings.congestion,
        )
        nursery.start_soon(self._block_service.close_idle_fetches)
        await nursery.start(server.run)
        if port == 0 and not settings.advertise:
            self._url = str(self._url).rpartition(":")[0] + f":{server.port}"
        _log.info("serving blocks to other nodes at %s as %s", self._url, settings.node)

    def _make_discovery(self) -> Discovery:
        settings = self._settings
        if settings.discovery == "dns":
            host, port = split_address(settings.dns)
            return DnsDiscovery(host, port, "https" if self._client_tls else "http")
        if settings.discovery == "etcd":
            me = None if self._url is None else {"name": settings.node, "url": self._url}
            return EtcdDiscovery(settings.etcd, settings.etcd_prefix, me, instance=self._instance_id)
        return StaticDiscovery(settings.members)

    # -- what the others have

    async def _poll_coverage_when_needed(self) -> None:
        """Until cancelled, keep asking the other nodes what they have while room in the store is short."""
        while True:
            usage = await trio.to_thread.run_sync(self._store.usage)
            if usage.fullness > _NEARLY_FULL:
                await self.poll_coverage()
            await trio.sleep(max(_COVERAGE_EVERY, len(self._members.members()) / _NODES_POLLED_PER_SECOND))

    async def poll_coverage(self) -> None:
        """Ask all other nodes what they have."""
        found: dict[str, dict[ObjectId, int]] = {}

        async def ask(name: str, url: str) -> None:
            try:
                answer = await trio.to_thread.run_sync(
                    functools.partial(self._client.request_json, url, "/v1/objects", _COVERAGE_TIMEOUT)
                )
                found[name] = {ObjectId(str(item["id"])): int(item["cached_bytes"]) for item in answer}
            except (FusecacheError, TypeError, KeyError, ValueError) as error:
                _log.debug("node %s does not tell what it has: %s", name, error)

        async with trio.open_nursery() as nursery:
            for member in self._members.members():
                if member.name != self._settings.node:
                    nursery.start_soon(ask, member.name, member.url)
        self._coverage = found

    def _is_spare(self, object_id: ObjectId) -> bool:
        """Whether another node has this object, and is the one to keep it longer."""
        version = self._store.version_of(object_id)
        if version is None:
            return False
        for member in rank_members(object_id, -1, self._members.members()):
            if member.name == self._settings.node:
                return False
            if self._coverage.get(member.name, {}).get(object_id, 0) >= version.size:
                return True
        return False

    # -- seeing it

    async def report(self) -> dict[str, Any]:
        """Everything `fusecache peers` tells."""
        await self.poll_coverage()
        return {
            "node": self._settings.node,
            "url": self._url,
            "discovery": self._settings.discovery,
            "tenant": self._settings.tenant,
            "members": await trio.to_thread.run_sync(self._member_rows),
            "coverage": await trio.to_thread.run_sync(self._coverage_rows),
            **self.counters(),
        }

    def _member_rows(self) -> list[dict[str, Any]]:
        shares = self._weight_shares()
        rows = []
        for state in self._members.member_states():
            traffic = self.block_source.traffic(state.name)
            why, bad = self.block_source.breaker.describe_node(state.name)
            rows.append(
                {
                    **vars(state),
                    "avoided": why,
                    "share": shares.get(state.name, 0.0) if state.state == "alive" else 0.0,
                    "bytes_in": traffic.bytes_in,
                    "bytes_out": traffic.bytes_out,
                    "requests": traffic.requests,
                    "errors": traffic.errors,
                    "bad_blocks": bad,
                    "first_byte": traffic.first_byte_seconds,
                    "bytes_per_second": self.block_source.speeds.stored_rate(state.name),
                }
            )
        return rows

    def _weight_shares(self) -> dict[str, float]:
        members = self._members.members()
        total = sum(member.weight for member in members)
        return {member.name: member.weight / total for member in members}

    def _coverage_rows(self) -> list[dict[str, Any]]:
        """Bytes of each object per node."""
        found: dict[ObjectId, dict[str, Any]] = {}
        for info in self._store.objects():
            found[info.id] = {
                "id": info.id,
                "source": info.version.origin,
                "key": info.version.key,
                "size": info.version.size,
                "nodes": {self._settings.node: info.present_bytes},
            }
        for name, objects in self._coverage.items():
            for object_id, nbytes in objects.items():
                if object_id in found:
                    found[object_id]["nodes"][name] = nbytes
        return sorted(found.values(), key=lambda item: (item["source"], item["key"]))

    def counters(self) -> dict[str, Any]:
        """Figures of the exchange; quick, from any thread."""
        stats, holdings = self.block_source.stats, self._block_service
        peers = list(stats.traffic_by_node.values())
        return {
            "bytes_in": stats.bytes_from_peers,
            "bytes_out": sum(traffic.bytes_out for traffic in peers),
            "bad_blocks": sum(traffic.bad_blocks for traffic in peers),
            "errors": sum(traffic.errors for traffic in peers),
            "fallbacks": stats.fallbacks,
            "redirected": stats.redirects,
            "hedged": stats.hedges,
            "busy": stats.busy_answers,
            "refused": holdings.refused_requests if holdings else 0,
            "sending": holdings.responses_in_progress if holdings else 0,
            "queued": holdings.queued_requests if holdings else 0,
            "receiving": self.block_source.transfers_in_progress,
            "pace": self.block_source.peak_throughput(),
            "nodes": len(self._members.members()),
        }

    def close(self) -> None:
        """Close connections."""
        self._client.close()


class _LateMembership:
    """The membership, which comes after what asks it; nobody is there until then. Thread-safe."""

    def __init__(self) -> None:
        self.membership: Membership | None = None

    def members(self) -> Any:
        return () if self.membership is None else self.membership.members()

    def member_states(self) -> Any:
        return [] if self.membership is None else self.membership.member_states()

    def is_alive(self, name: str) -> bool:
        return self.membership is not None and self.membership.is_alive(name)

    def mark_heard(self, name: str) -> None:
        if self.membership is not None:
            self.membership.mark_heard(name)

    def mark_suspect(self, name: str) -> None:
        if self.membership is not None:
            self.membership.mark_suspect(name)


def _own_address_towards(settings: PeerSettings) -> str:
    """This machine's address as the others see it: the one it would reach them from. Raises ConfigError."""
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
