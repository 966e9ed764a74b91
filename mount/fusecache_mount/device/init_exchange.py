"""INIT: what the kernel offers at the start of a connection, and what the channel asks for in its reply."""

from __future__ import annotations

from fusecache_mount.kernel import protocol


class InitExchange:
    """The INIT request of a connection, and how its reply is rewritten; without a request, nothing is supported.

    | State | By | Next |
    |---|---|---|
    | no request | `record_request`, from the kernel or as an earlier daemon got it | request known, for good |
    """

    def __init__(self, limits: protocol.InitLimits, *, requests_passthrough: bool) -> None:
        self._limits = limits
        self._requests_passthrough = requests_passthrough
        self._request = b""

    @property
    def request(self) -> bytes:
        """The whole request; empty before it came."""
        return self._request

    def record_request(self, request: bytes) -> None:
        """The kernel sent this."""
        self._request = request

    def rewrite_reply(self, reply: bytearray) -> None:
        """Ask for passthrough, if it is wanted and to be had, and for deep queues in pyfuse3's reply."""
        asks = self._requests_passthrough and protocol.supports_passthrough(self._request)
        protocol.rewrite_init(reply, self._limits, passthrough=asks)

    @property
    def supports_resend(self) -> bool:
        """Whether the kernel sends again, when it is told to, what an earlier daemon left unanswered."""
        return protocol.supports_resend(self._request)

    @property
    def supports_expire(self) -> bool:
        """Whether the kernel can let a name expire without dropping what is below it."""
        return protocol.supports_expire(self._request)
