"""Asks a URL which node is there: GET /v1/health."""

from __future__ import annotations

import ssl
from types import TracebackType

import httpx

from fusecache.peers.errors import PeerError, PeerRefusedError
from fusecache.peers.member import NodeInfo, unpack_node_info

_MAX_BODY = 16 * 1024


class HttpProbe:
    """Asks nodes who they are; an async context manager. `tls` is for mutual TLS. Sets no deadline: callers do."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._client = httpx.AsyncClient(
            verify=tls if tls is not None else False,
            trust_env=False,
            timeout=None,  # noqa: S113  the caller has a deadline
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=30),
        )

    async def __aenter__(self) -> HttpProbe:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def __call__(self, url: str) -> NodeInfo:
        """The introduction of the node at `url`. Raises PeerError, PeerRefusedError when TLS fails."""
        body = b""
        try:
            async with self._client.stream("GET", f"{url}/v1/health") as answer:
                if answer.status_code != 200:
                    raise PeerError(f"{url}: answered {answer.status_code}")
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > _MAX_BODY:
                        raise PeerError(f"{url}: what answers is not a node of a cluster")
        except httpx.HTTPError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ssl.SSLError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                raise PeerRefusedError(f"{url}: TLS: {cause.reason or cause}") from None
            raise PeerError(f"{url}: {str(error) or type(error).__name__}") from None
        return unpack_node_info(body)
