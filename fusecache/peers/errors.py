"""Why a node did not give what it was asked for."""

from __future__ import annotations

from fusecache.errors import FusecacheError


class PeerError(FusecacheError):
    """A request to another node failed: the node does not answer, breaks off, or breaks the protocol."""


class PeerConnectTimeoutError(PeerError):
    """No connection came about in time: the node is gone, or so much is sent to it that its answers are lost."""


class PeerRefusedError(PeerError):
    """The node does not let us in: another secret, tenant, certificate or protocol, or a clock that is off."""


class PeerMissError(PeerError):
    """The node does not have these blocks, and is not the one to fetch them."""


class PeerBadBlockError(PeerError):
    """The node sent a block whose bytes do not have the checksum that it announced."""


class TransferAbandonedError(PeerError):
    """The observer of a request found that its answer is not worth waiting for any longer."""


class PeerVersionGoneError(PeerError):
    """The node found that the origin has another version of the object now, or none."""


class PeerBusyError(PeerError):
    """The node has too much to do: ask it again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PeerRedirectError(PeerError):
    """Another node, at `url`, has the blocks too, and less to do."""

    def __init__(self, message: str, url: str = "") -> None:
        super().__init__(message)
        self.url = url
