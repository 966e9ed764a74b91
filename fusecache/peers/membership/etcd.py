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

from fusecache.errors import first_error
from fusecache.peers.membership.discovery import CandidatesListener

_log = logging.getLogger(__name__)

_TIMEOUT = 5.0
_WATCH_SILENCE_TIMEOUT = 30.0
"""Seconds without a message on a watch after which the keys are read anew."""
_RETRY_DELAYS = (0.2, 5.0)
_MAX_KEYS = 20_000
_MAX_VALUE_CHARS = 4096
_REVOKE_TIMEOUT = 1.0


class EtcdDiscovery:
    """The nodes that have a key below `prefix` in etcd. `own_entry` is this node's value ({"name", "url"}); None: it
    does not serve, and has no key. `instance` tells this node from another one of its name; `ttl` is that of the lease,
    in seconds.

    | Session | What happens | Next |
    |---|---|---|
    | none | a server answers: lease, key, all keys | watching |
    | watching | a message: the candidates change | watching |
    | watching | the stream ends, or is silent for long; the lease is lost | none, with the next server |
    """

    def __init__(
        self,
        servers: Sequence[str],
        prefix: str,
        own_entry: Mapping[str, str] | None,
        *,
        instance: str,
        ttl: int = 10,
        make_client: Callable[[], httpx.AsyncClient] = lambda: httpx.AsyncClient(
            trust_env=False, timeout=_TIMEOUT
        ),
    ) -> None:
        self._servers = list(servers)
        self._prefix = prefix.rstrip("/") + "/members/"
        self._own_entry = own_entry
        self._own_key = f"{self._prefix}{own_entry['name']}-{instance}" if own_entry is not None else ""
        self._ttl = ttl
        self._make_client = make_client
        self._urls_by_key: dict[str, str] = {}
        self._reported_urls: frozenset[str] | None = None
        self._is_failing = False
        self._rejected_keys: set[str] = set()

    async def run(self, on_candidates: CandidatesListener) -> None:
        """Keep this node's key alive, and report the nodes that have one; a session at a time."""
        delay = _RETRY_DELAYS[0]
        async with self._make_client() as http:
            while True:
                try:
                    await self._run_session(http, on_candidates)
                    delay = _RETRY_DELAYS[0]
                except* (httpx.HTTPError, ValueError, KeyError, TypeError, trio.TooSlowError) as group:
                    error = first_error(group)
                    if not self._is_failing:
                        self._is_failing = True
                        _log.warning(
                            "peers.etcd=%s does not answer (%s): going on with the %d nodes known before",
                            self._servers[0],
                            str(error) or type(error).__name__,
                            len(self._urls_by_key),
                        )
                    if self._reported_urls is None:
                        self._report_candidates(on_candidates)
                self._servers.append(self._servers.pop(0))
                await trio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311  jitter
                delay = min(_RETRY_DELAYS[1], delay * 2)

    def _report_candidates(self, on_candidates: CandidatesListener) -> None:
        urls = frozenset(self._urls_by_key.values())
        if urls != self._reported_urls:
            self._reported_urls = urls
            on_candidates(urls)

    async def _run_session(self, http: httpx.AsyncClient, on_candidates: CandidatesListener) -> None:
        """Join and watch with the first server, until the watch ends or something fails."""
        lease: int | None = None
        if self._own_entry is not None:
            lease = int((await self._post_command(http, "lease/grant", {"TTL": self._ttl}))["ID"])
        try:
            if lease is not None:
                value = json.dumps(self._own_entry)
                put = {
                    "key": _encode_base64(self._own_key),
                    "value": _encode_base64(value),
                    "lease": str(lease),
                }
                await self._post_command(http, "kv/put", put)
            end = self._prefix[:-1] + chr(ord(self._prefix[-1]) + 1)
            span = {"key": _encode_base64(self._prefix), "range_end": _encode_base64(end)}
            answer = await self._post_command(http, "kv/range", {**span, "limit": str(_MAX_KEYS)})
            known: dict[str, str] = {}
            for item in answer.get("kvs", []):
                self._add_candidate(known, item)
            self._urls_by_key = known
            if self._is_failing:
                _log.info("peers.etcd=%s answers again", self._servers[0])
            self._is_failing = False
            self._report_candidates(on_candidates)
            revision = int(answer["header"]["revision"]) + 1
            async with trio.open_nursery() as nursery:
                if lease is not None:
                    nursery.start_soon(self._keep_lease_alive, http, lease)
                await self._follow_changes(http, {**span, "start_revision": str(revision)}, on_candidates)
                nursery.cancel_scope.cancel()
        finally:
            if lease is not None:
                with trio.move_on_after(_REVOKE_TIMEOUT, shield=True):
                    try:
                        await self._post_command(http, "lease/revoke", {"ID": str(lease)})
                    except (httpx.HTTPError, ValueError):
                        _log.debug("the lease ends by itself")

    async def _keep_lease_alive(self, http: httpx.AsyncClient, lease: int) -> None:
        """Renew the lease every third of its time; never returns. Raises ValueError when the lease is lost."""
        while True:
            await trio.sleep(self._ttl / 3)
            answer = await self._post_command(http, "lease/keepalive", {"ID": str(lease)})
            if int(answer.get("result", {}).get("TTL", 0)) <= 0:
                raise ValueError("the lease was lost")

    async def _follow_changes(
        self, http: httpx.AsyncClient, span: Mapping[str, str], on_candidates: CandidatesListener
    ) -> None:
        """Apply changes of keys until the stream ends, or is silent for long."""
        request = {"create_request": {**span, "progress_notify": True}}
        url = f"{self._servers[0]}/v3/watch"
        timeout = httpx.Timeout(_TIMEOUT, read=_WATCH_SILENCE_TIMEOUT)
        async with http.stream("POST", url, json=request, timeout=timeout) as answer:
            answer.raise_for_status()
            async for line in _bounded_lines(answer):
                result = json.loads(line)["result"]
                if result.get("canceled"):
                    return
                for event in result.get("events", []):
                    item = event["kv"]
                    if event.get("type") == "DELETE":
                        self._urls_by_key.pop(_decode_base64(item["key"]), None)
                    else:
                        self._add_candidate(self._urls_by_key, item)
                self._report_candidates(on_candidates)

    def _add_candidate(self, urls_by_key: dict[str, str], item: Mapping[str, Any]) -> None:
        """Add the node that an item of etcd describes; an item that describes none is logged once and left out."""
        key = ""
        try:
            key = _decode_base64(item["key"])
            text = _decode_base64(item.get("value", ""))
            if len(text) > _MAX_VALUE_CHARS or len(urls_by_key) >= _MAX_KEYS:
                raise ValueError("too much")
            url = json.loads(text)["url"]
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port or parts.path:
                raise ValueError("not a URL of a node")
            urls_by_key[key] = url
        except (ValueError, KeyError, TypeError, RecursionError):
            if len(self._rejected_keys) < 100 and key not in self._rejected_keys:
                self._rejected_keys.add(key)
                _log.warning("peers.etcd: the key %.200r does not hold a node: it is left out", key)

    async def _post_command(
        self, http: httpx.AsyncClient, method: str, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        with trio.fail_after(_TIMEOUT):
            answer = await http.post(f"{self._servers[0]}/v3/{method}", json=body)
        answer.raise_for_status()
        found = answer.json()
        if not isinstance(found, dict):
            raise ValueError("not an answer of etcd")
        return found


async def _bounded_lines(answer: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream, without empty ones. Raises ValueError for one that is longer than any answer of etcd."""
    left = ""
    async for part in answer.aiter_text():
        left += part
        *whole, left = left.split("\n")
        for line in whole:
            if line:
                yield line
        if len(left) > 64 << 20:
            raise ValueError("an endless line")


def _encode_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decode_base64(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError("not base64 of a text") from error
