"""The protocol between nodes (docs/PROTOCOL.md) as text and bytes: the part on which both ends agree. Pure.

Everything that is parsed here comes from another machine: names, numbers and sizes are checked before they are used.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from fusecache.peers.errors import PeerError
from fusecache.types import NODE_NAME_PATTERN, ObjectId, ObjectVersion

CONTENT_TYPE = "application/vnd.fusecache.blocks"
FRAME_HEADER = struct.Struct("<QII")
"""Stands before the bytes of each block: xxh3_64 of them, their length, the block's index."""

MAX_REQUEST_BLOCKS = 4096
MAX_HOPS = 4
MAX_OBJECT_SIZE = 64 << 40
"""Bytes of the largest object: more than any object storage takes."""
MAX_REQUEST_DEADLINE = 120.0
MAX_HEAD_BYTES = 16 * 1024
"""Bytes of the largest head of a request or answer."""

AGE_HEADER = "Fusecache-Age"
"""Header of an interim answer: seconds since the node at the end of the chain, which waits for the origin, said so."""

_BLOCKS_TARGET = re.compile(r"/v1/objects/([0-9a-f]{32})/blocks/(\d{1,12})-(\d{1,12})(\?frames=0)?")
_PROFILE_TARGET = re.compile(r"/v1/profiles/([0-9a-f]{32})")
_INTEGER = re.compile(r"\d{1,18}")
_URGENCY_PARAMETER = re.compile(r"(?:^|,)\s*u=([0-7])(?:\s*[,;]|\s*$)")
_DEFAULT_URGENCY = 3
_PREFETCH_URGENCY = 5
"""Urgency of blocks that no reader waits for: RFC 9218 counts from 0, the most urgent, to 7."""
_DECIMAL = re.compile(r"\d{1,9}(\.\d{1,9})?")


class RequestError(Exception):
    """A request that gets another answer than blocks. `text` is one line for the caller."""

    def __init__(
        self, status: int, text: str, headers: Mapping[str, str] | None = None, **extra_fields: str
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = dict(headers or {})
        self.extra_fields = extra_fields
        """Further members of the JSON body."""

    def body(self) -> bytes:
        """The JSON body of the answer."""
        return json.dumps({"error": self.text, **self.extra_fields}).encode() + b"\n"


@dataclass(frozen=True)
class BlockRequest:
    """Blocks of one object that a node wants. `version` is None for a caller who knows the id alone: such a caller gets
    stored blocks only. `deadline` is in seconds from now; `failed_nodes` are ahead of the asked node in the ranking of
    the stripe, and did not answer the caller."""

    object_id: ObjectId
    blocks: range
    version: ObjectVersion | None = None
    block_size: int | None = None
    deadline: float = 60.0
    hops: int = 0
    stored_only: bool = False
    failed_nodes: tuple[str, ...] = ()
    direct: bool = False
    """The asked node is not to redirect the caller to another holder."""
    with_frames: bool = True
    urgent: bool = True
    """A reader waits for the blocks; otherwise the caller fetches them ahead."""
    unsent_bytes: int = 0
    """Bytes that the caller has promised to other nodes, and not sent yet."""
    receive_rate: int = 0
    """Bytes per second that the caller gets from other nodes at best; 0: it does not know."""
    caller: str = ""
    """Name of the calling node, as it claims and, if requests are signed, proves; "": it gave none."""

    @property
    def target(self) -> str:
        """The path, with its query."""
        query = "" if self.with_frames else "?frames=0"
        return f"/v1/objects/{self.object_id}/blocks/{self.blocks.start}-{self.blocks.stop - 1}{query}"

    def headers(self) -> dict[str, str]:
        """The part of the request that is not in the path."""
        found = {"Fusecache-Deadline": f"{self.deadline:.3f}", "Fusecache-Hops": str(self.hops)}
        if self.version is not None:
            found["Fusecache-Version"] = pack_version(self.version)
        if self.block_size is not None:
            found["Fusecache-Block-Size"] = str(self.block_size)
        if self.stored_only:
            found["Fusecache-Only"] = "stored"
        if self.direct:
            found["Fusecache-Direct"] = "1"
        if not self.urgent:
            found["Priority"] = f"u={_PREFETCH_URGENCY}"
        if self.failed_nodes:
            found["Fusecache-Failed"] = ",".join(self.failed_nodes)
        if self.caller:
            found["Fusecache-Node"] = self.caller
            found["Fusecache-Unsent-Bytes"] = str(self.unsent_bytes)
            found["Fusecache-Receive-Rate"] = str(self.receive_rate)
        return found


def parse_age(text: str | None) -> float:
    """The value of AGE_HEADER in seconds; infinite when it is not a number."""
    return float(text) if text and _DECIMAL.fullmatch(text) else math.inf


def parse_block_request(target: str, headers: Mapping[str, str]) -> BlockRequest:
    """The request that a target and headers make; header names are in lower case. Raises RequestError 400 or 404."""
    match = _BLOCKS_TARGET.fullmatch(target)
    if match is None:
        raise RequestError(404, "no such resource: see docs/PROTOCOL.md")
    first, last = int(match[2]), int(match[3])
    if not first <= last < first + MAX_REQUEST_BLOCKS:
        raise RequestError(400, f"1 to {MAX_REQUEST_BLOCKS} ascending blocks per request")
    object_id = ObjectId(match[1])
    version = None
    if "fusecache-version" in headers:
        version = unpack_version(headers["fusecache-version"])
        if version.id != object_id:
            raise RequestError(400, "Fusecache-Version is not the version of this object id")
    failed = tuple(name for name in headers.get("fusecache-failed", "").split(",") if name)
    if len(failed) > 64 or not all(NODE_NAME_PATTERN.fullmatch(name) for name in failed):
        raise RequestError(400, "Fusecache-Failed is not a list of names")
    node = headers.get("fusecache-node", "")
    if node and not NODE_NAME_PATTERN.fullmatch(node):
        raise RequestError(400, "Fusecache-Node is not a name")
    hops = _parse_integer(headers, "fusecache-hops", 0)
    if hops > MAX_HOPS:
        raise RequestError(400, f"more than {MAX_HOPS} hops")
    only = headers.get("fusecache-only", "")
    if only not in ("", "stored"):
        raise RequestError(400, "Fusecache-Only takes the word stored")
    deadline = headers.get("fusecache-deadline", "60")
    if not _DECIMAL.fullmatch(deadline):
        raise RequestError(400, "Fusecache-Deadline is not in seconds")
    block_size = _parse_integer(headers, "fusecache-block-size", 0)
    return BlockRequest(
        object_id,
        range(first, last + 1),
        version,
        block_size or None,
        min(float(deadline), MAX_REQUEST_DEADLINE),
        hops,
        only == "stored" or version is None,
        failed,
        headers.get("fusecache-direct") == "1",
        match[4] is None,
        _parse_urgency(headers) < _PREFETCH_URGENCY,
        _parse_integer(headers, "fusecache-unsent-bytes", 0),
        _parse_integer(headers, "fusecache-receive-rate", 0),
        node,
    )


def _parse_urgency(headers: Mapping[str, str]) -> int:
    """The urgency in the header Priority (RFC 9218), whose other parameters do not matter here. A value that can't be
    read counts as absent, as the RFC has it."""
    match = _URGENCY_PARAMETER.search(headers.get("priority", ""))
    return int(match[1]) if match else _DEFAULT_URGENCY


def profile_target(name: str) -> str:
    """The path of an access profile."""
    return f"/v1/profiles/{name}"


def parse_profile_target(target: str) -> str | None:
    """The name in the path of an access profile; None: it is the path of another resource."""
    match = _PROFILE_TARGET.fullmatch(target)
    return None if match is None else match[1]


def _parse_integer(headers: Mapping[str, str], name: str, default: int) -> int:
    text = headers.get(name)
    if text is None:
        return default
    if not _INTEGER.fullmatch(text):
        raise RequestError(400, f"{name} is not a number")
    return int(text)


def pack_version(version: ObjectVersion) -> str:
    """The version as the value of a header."""
    fields = [version.origin, version.key, version.etag, version.size, version.mtime_ns]
    return base64.urlsafe_b64encode(json.dumps(fields, separators=(",", ":")).encode()).decode()


def unpack_version(text: str) -> ObjectVersion:
    """The version in the value of a header. Raises RequestError 400."""
    try:
        fields = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
        origin, key, etag, size, mtime_ns = fields
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise RequestError(400, "Fusecache-Version can't be read") from None
    if not (isinstance(origin, str) and isinstance(key, str) and isinstance(etag, str)):
        raise RequestError(400, "Fusecache-Version has a text of another type")
    if type(size) is not int or type(mtime_ns) is not int or not 0 <= size <= MAX_OBJECT_SIZE:
        raise RequestError(400, "Fusecache-Version has a number that can't be")
    return ObjectVersion(origin, key, etag, size, mtime_ns)


def parse_frame_checksum(header: bytes | bytearray, block: int, length: int) -> int:
    """The checksum in the header of a frame. Raises PeerError when the frame is not that of this block and length."""
    checksum, found_length, found_block = FRAME_HEADER.unpack(header)
    if found_block != block or found_length != length or not checksum:
        raise PeerError(f"sent block {found_block} of {found_length} bytes for block {block} of {length}")
    return int(checksum)
