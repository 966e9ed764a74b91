"""Why a node did not give what it was asked for."""

from __future__ import annotations

from fusecache.errors import FusecacheError


class PeerError(FusecacheError):
    """A request to another node failed: it does not answer, breaks off, or breaks the protocol."""


class PeerRefusedError(PeerError):
    """The node does not let us in: another secret, tenant, certificate or protocol, or a clock that is off."""


class PeerMissError(PeerError):
    """The node has not got these blocks, and is not the one to fetch them."""


class PeerGoneError(PeerError):
    """The node found that the origin has another version now, or none."""
