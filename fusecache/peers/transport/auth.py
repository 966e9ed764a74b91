"""Which requests are answered: those that are signed with the cluster's shared secret.

A signature is an HMAC-SHA256 over the method, the target (path and query: the object and the range), the tenant, the
node, the time, a nonce, and every header whose name begins with `fusecache-`. It is good for a minute around the
server's clock, and once: the server remembers the nonces of that window.
"""

from __future__ import annotations

import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping

from fusecache.bounded import BoundedDict
from fusecache.peers.transport.wire import RequestError
from fusecache.types import NODE_NAME_PATTERN

AUTH_SCHEME = "Fusecache-HMAC-SHA256"
MAX_CLOCK_SKEW = 60.0
"""Seconds by which the time of a request may differ from the server's clock."""
_MAX_NONCES = 400_000
"""Nonces remembered at a time; a server that got more within the window refuses further requests."""
_AUTH_FIELD = re.compile(r"(node|tenant|time|nonce|signature)=([A-Za-z0-9._-]{0,64})")


def _sign_request(
    secret: bytes,
    method: str,
    target: str,
    headers: Mapping[str, str],
    signer_fields: tuple[str, str, str, str],
) -> str:
    own = sorted(
        f"{name.lower()}:{value}" for name, value in headers.items() if name.lower().startswith("fusecache-")
    )
    text = "\n".join(("fusecache-1", method, target, *signer_fields, *own))
    return hmac.digest(secret, text.encode(), "sha256").hex()


class RequestSigner:
    """Signs this node's requests. `clock` gives seconds since the epoch. Thread-safe."""

    def __init__(
        self, secret: str, own_name: str, tenant: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._secret = secret.encode()
        self._own_name = own_name
        self._tenant = tenant
        self._clock = clock

    def authorization_header(
        self, method: str, target: str, headers: Mapping[str, str], clock_offset: float = 0.0
    ) -> str:
        """The Authorization header of a request. `clock_offset`: seconds by which the server's clock is ahead."""
        now = str(int(self._clock() + clock_offset))
        nonce = secrets.token_hex(16)
        signature = _sign_request(
            self._secret, method, target, headers, (self._tenant, self._own_name, now, nonce)
        )
        return (
            f"{AUTH_SCHEME} node={self._own_name},tenant={self._tenant},"
            f"time={now},nonce={nonce},signature={signature}"
        )


class RequestVerifier:
    """Checks the signatures of requests, with one secret and for one tenant. Thread-safe: `_lock` guards the nonces and
    is a leaf. `clock` gives seconds since the epoch."""

    def __init__(self, secret: str, tenant: str, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret.encode()
        self._tenant = tenant
        self._clock = clock
        self._lock = threading.Lock()
        # a time up to MAX_CLOCK_SKEW ahead of this clock is accepted: remember until it is as much behind
        self._seen_nonces: BoundedDict[str, None] = BoundedDict(
            _MAX_NONCES, max_age=2 * MAX_CLOCK_SKEW, clock=clock
        )

    def verify_request(self, method: str, target: str, headers: Mapping[str, str]) -> str:
        """The name of the node that signed this request; header names are in lower case. Raises RequestError 401, 403
        for another tenant, or 503. A 401 carries this node's time, so that a node with a wrong clock can still ask."""
        now = self._clock()
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        if scheme != AUTH_SCHEME:
            raise self._unauthorized_error("this cluster's requests are signed (peers.secret)", now)
        fields = {}
        for part in rest.split(","):
            match = _AUTH_FIELD.fullmatch(part.strip())
            if match is None or match[1] in fields:
                raise self._unauthorized_error("the Authorization header can't be read", now)
            fields[match[1]] = match[2]
        if (
            len(fields) != 5
            or not NODE_NAME_PATTERN.fullmatch(fields["node"])
            or not fields["time"].isdecimal()
        ):
            raise self._unauthorized_error("the Authorization header can't be read", now)
        signer_fields = (fields["tenant"], fields["node"], fields["time"], fields["nonce"])
        expected = _sign_request(self._secret, method, target, headers, signer_fields)
        if not hmac.compare_digest(expected, fields["signature"]):
            raise self._unauthorized_error("the signature is wrong: peers.secret differs", now)
        if fields["tenant"] != self._tenant:
            raise RequestError(403, "this node is another tenant's")
        if abs(int(fields["time"]) - now) > MAX_CLOCK_SKEW:
            raise self._unauthorized_error(
                "the clocks differ by more than a minute: set them", now, reason="clock"
            )
        self._remember_nonce(fields["nonce"], now)
        return fields["node"]

    def _unauthorized_error(self, text: str, now: float, **extra_fields: str) -> RequestError:
        return RequestError(
            401, text, {"WWW-Authenticate": AUTH_SCHEME, "Fusecache-Time": str(int(now))}, **extra_fields
        )

    def _remember_nonce(self, nonce: str, now: float) -> None:
        with self._lock:
            if len(nonce) != 32 or nonce in self._seen_nonces:
                raise self._unauthorized_error("this request was made before", now)
            if len(self._seen_nonces) >= _MAX_NONCES:
                raise RequestError(503, "too many requests", {"Retry-After": "1"})
            self._seen_nonces[nonce] = None
