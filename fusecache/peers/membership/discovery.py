"""Where the other nodes may be: a list, or the addresses of a name. The third way, etcd, has a module of its own."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import trio

_log = logging.getLogger(__name__)

RESOLVE_INTERVAL = 5.0
"""Seconds between lookups of a name."""
_RESOLVE_TIMEOUT = 5.0

CandidatesListener = Callable[[frozenset[str]], None]


class Discovery(Protocol):
    """A source of candidates: URLs at which a node may be."""

    async def run(self, on_candidates: CandidatesListener) -> None:
        """Call `on_candidates` with the URLs of all nodes there may be, at once and whenever they change; never
        returns. A discovery that fails logs it once and tries again; meanwhile the candidates found before stay."""
        ...


class StaticDiscovery:
    """The nodes that the settings list."""

    def __init__(self, urls: Iterable[str]) -> None:
        self._urls = frozenset(urls)

    async def run(self, on_candidates: CandidatesListener) -> None:
        """Report the list once, and sleep."""
        on_candidates(self._urls)
        await trio.sleep_forever()


class DnsDiscovery:
    """The addresses of a name, like those of a headless Service. `interval` is in seconds; `resolve_host` is like
    trio.socket.getaddrinfo."""

    def __init__(
        self,
        host: str,
        port: int,
        scheme: str,
        *,
        interval: float = RESOLVE_INTERVAL,
        resolve_host: Callable[..., Awaitable[list[Any]]] = trio.socket.getaddrinfo,
    ) -> None:
        self._host = host
        self._port = port
        self._scheme = scheme
        self._interval = interval
        self._resolve_host = resolve_host

    async def run(self, on_candidates: CandidatesListener) -> None:
        """Look the name up every few seconds, and report its addresses when they changed."""
        known: frozenset[str] = frozenset()
        trouble = ""
        while True:
            reason = "it has no addresses"
            urls: frozenset[str] = frozenset()
            try:
                with trio.fail_after(_RESOLVE_TIMEOUT):
                    urls = await self._resolve_urls()
            except trio.TooSlowError:
                reason = f"no answer within {_RESOLVE_TIMEOUT:g} s"
            except OSError as error:
                reason = error.strerror or str(error)
            if urls and urls != known:
                known = urls
                on_candidates(known)
            elif not urls and not trouble:
                trouble = reason
                _log.warning(
                    "peers.dns=%s:%d: %s: going on with the %d addresses known before",
                    self._host,
                    self._port,
                    reason,
                    len(known),
                )
            if urls:
                trouble = ""
            await trio.sleep(self._interval * random.uniform(0.8, 1.2))  # noqa: S311  jitter

    async def _resolve_urls(self) -> frozenset[str]:
        answers = await self._resolve_host(self._host, self._port, type=socket.SOCK_STREAM)
        urls = set()
        for family, _, _, _, address in answers:
            host = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
            urls.add(f"{self._scheme}://{host}:{self._port}")
        return frozenset(urls)
