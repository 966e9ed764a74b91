"""Nodes that find each other in etcd (version 3, over its JSON gateway): a key per node with a lease, and a watch.

https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/ has the requests; keys and values are base64 there. An etcd that
is away takes nothing with it: nodes go on with those they know, and probe them themselves.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import trio

from fusecache.peers.discovery import Found

_log = logging.getLogger(__name__)

_TIMEOUT = 5.0
_SILENCE = 30.0
"""Seconds without a word on a watch after which the keys are read anew."""
_REST = (0.2, 5.0)
_MOST_KEYS = 20_000
_MOST_VALUE = 4096
_GOODBYE = 1.0


class Etcd:
    """See Discovery. `me` is what others need to know of this node ({"name", "url"}), None: it only looks; `instance`
    tells it from another of its name; `ttl` of the lease in seconds."""

    def __init__(
        self,
        servers: Sequence[str],
        prefix: str,
        me: Mapping[str, str] | None,
        *,
        instance: str,
        ttl: int = 10,
        client: Callable[[], httpx.AsyncClient] = lambda: httpx.AsyncClient(
            trust_env=False, timeout=_TIMEOUT
        ),
    ) -> None:
        self._servers = list(servers)
        self._prefix = prefix.rstrip("/") + "/members/"
        self._me = me
        self._key = f"{self._prefix}{me['name']}-{instance}" if me is not None else ""
        self._ttl = ttl
        self._client = client
        self._known: dict[str, str] = {}
        self._reported: frozenset[str] | None = None
        self._trouble = False
        self._odd: set[str] = set()

    async def run(self, found: Found) -> None:
        """See Discovery."""
        rest = _REST[0]
        async with self._client() as http:
            while True:
                try:
                    await self._session(http, found)
                    rest = _REST[0]
                except* (httpx.HTTPError, ValueError, KeyError, TypeError, trio.TooSlowError) as group:
                    error = group.exceptions[0]
                    while isinstance(error, BaseExceptionGroup):
                        error = error.exceptions[0]
                    if not self._trouble:
                        self._trouble = True
                        _log.warning(
                            "peers.etcd=%s does not answer (%s): going on with the %d nodes known before",
                            self._servers[0],
                            str(error) or type(error).__name__,
                            len(self._known),
                        )
                    if self._reported is None:
                        self._report(found)
                self._servers.append(self._servers.pop(0))
                await trio.sleep(rest * random.uniform(0.5, 1.0))  # noqa: S311  jitter
                rest = min(_REST[1], rest * 2)

    def _report(self, found: Found) -> None:
        urls = frozenset(self._known.values())
        if urls != self._reported:
            self._reported = urls
            found(urls)

    async def _session(self, http: httpx.AsyncClient, found: Found) -> None:
        """Join and watch with one server, until something fails."""
        lease: int | None = None
        if self._me is not None:
            lease = int((await self._call(http, "lease/grant", {"TTL": self._ttl}))["ID"])
        try:
            if lease is not None:
                value = json.dumps(self._me)
                put = {"key": _text(self._key), "value": _text(value), "lease": str(lease)}
                await self._call(http, "kv/put", put)
            end = self._prefix[:-1] + chr(ord(self._prefix[-1]) + 1)
            span = {"key": _text(self._prefix), "range_end": _text(end)}
            answer = await self._call(http, "kv/range", {**span, "limit": str(_MOST_KEYS)})
            known: dict[str, str] = {}
            for item in answer.get("kvs", []):
                self._learn(known, item)
            self._known = known
            if self._trouble:
                _log.info("peers.etcd=%s answers again", self._servers[0])
            self._trouble = False
            self._report(found)
            revision = int(answer["header"]["revision"]) + 1
            async with trio.open_nursery() as nursery:
                if lease is not None:
                    nursery.start_soon(self._keep, http, lease)
                await self._watch(http, {**span, "start_revision": str(revision)}, found)
                nursery.cancel_scope.cancel()
        finally:
            if lease is not None:
                with trio.move_on_after(_GOODBYE, shield=True):
                    try:
                        await self._call(http, "lease/revoke", {"ID": str(lease)})
                    except (httpx.HTTPError, ValueError):
                        _log.debug("the lease ends by itself")

    async def _keep(self, http: httpx.AsyncClient, lease: int) -> None:
        """Renew the lease; returns never, raises ValueError when it is lost."""
        while True:
            await trio.sleep(self._ttl / 3)
            answer = await self._call(http, "lease/keepalive", {"ID": str(lease)})
            if int(answer.get("result", {}).get("TTL", 0)) <= 0:
                raise ValueError("the lease was lost")

    async def _watch(self, http: httpx.AsyncClient, span: Mapping[str, str], found: Found) -> None:
        """Follow changes until the stream ends, or is silent for long."""
        request = {"create_request": {**span, "progress_notify": True}}
        url = f"{self._servers[0]}/v3/watch"
        timeout = httpx.Timeout(_TIMEOUT, read=_SILENCE)
        async with http.stream("POST", url, json=request, timeout=timeout) as answer:
            answer.raise_for_status()
            async for line in _lines(answer):
                result = json.loads(line)["result"]
                if result.get("canceled"):
                    return
                for event in result.get("events", []):
                    item = event["kv"]
                    if event.get("type") == "DELETE":
                        self._known.pop(_plain(item["key"]), None)
                    else:
                        self._learn(self._known, item)
                self._report(found)

    def _learn(self, known: dict[str, str], item: Mapping[str, Any]) -> None:
        """Take a node in; what is not one is left out and told once."""
        key = ""
        try:
            key = _plain(item["key"])
            text = _plain(item.get("value", ""))
            if len(text) > _MOST_VALUE or len(known) >= _MOST_KEYS:
                raise ValueError("too much")
            url = json.loads(text)["url"]
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port or parts.path:
                raise ValueError("not a URL of a node")
            known[key] = url
        except (ValueError, KeyError, TypeError, RecursionError):
            if len(self._odd) < 100 and key not in self._odd:
                self._odd.add(key)
                _log.warning("peers.etcd: the key %.200r does not hold a node: it is left out", key)

    async def _call(self, http: httpx.AsyncClient, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with trio.fail_after(_TIMEOUT):
            answer = await http.post(f"{self._servers[0]}/v3/{method}", json=body)
        answer.raise_for_status()
        found = answer.json()
        if not isinstance(found, dict):
            raise ValueError("not an answer of etcd")
        return found


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """Lines, none of them longer than an answer can be."""
    left = ""
    async for part in answer.aiter_text():
        left += part
        *whole, left = left.split("\n")
        for line in whole:
            if line:
                yield line
        if len(left) > 64 << 20:
            raise ValueError("an endless line")


def _text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _plain(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError("not base64 of a text") from error
