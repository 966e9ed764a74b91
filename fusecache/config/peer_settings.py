"""The settings of the exchange between nodes."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from fusecache.config.value_types import AbsolutePath, Bytes, Seconds, SettingsModel
from fusecache.types import NODE_NAME_PATTERN

_SEPARATOR = re.compile(r"[;\s]+")


def _split_words(value: Any) -> Any:
    """A text with spaces or semicolons between the words is a list, too: commas separate options."""
    if isinstance(value, str):
        return tuple(word for word in _SEPARATOR.split(value) if word)
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_split_words)]


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT, [IPV6]:PORT or :PORT (all addresses) as host and port. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address like 0.0.0.0:7070")
    if host.startswith("["):
        host = host.removeprefix("[").removesuffix("]")
    elif ":" in host:
        raise ValueError(f"{address!r}: write an IPv6 address in brackets")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class PeerSettings(SettingsModel):
    """How the nodes of a cluster find each other and exchange blocks."""

    discovery: Literal["none", "static", "dns", "etcd"] = Field(
        default="none", description="Where the other nodes are found; `none`: this node is alone."
    )
    members: Words = Field(
        default=(),
        description="`static`: URLs of all nodes, like `http://10.0.0.1:7070`, this one among them or not; with -o and "
        "in the environment with `;` between.",
    )
    dns: str = Field(
        default="",
        description="`dns`: NAME:PORT whose addresses are the nodes, like a headless Service; looked up repeatedly.",
    )
    etcd: Words = Field(default=(), description="`etcd`: URLs of the etcd servers, as `members`.")
    etcd_prefix: str = Field(
        default="/fusecache", description="`etcd`: where the nodes of this cluster are kept."
    )
    listen: str = Field(
        default="",
        description="HOST:PORT to serve blocks at; unset: take part without serving. Without `secret` or `tls_cert` a "
        "loopback address only.",
    )
    advertise: str | None = Field(
        default=None,
        description="URL that other nodes reach this one at; unset: made from `listen`, or from this machine's name.",
    )
    node: str = Field(
        default_factory=lambda: _node_name_from_host(os.uname().nodename),
        description="Name of this node, unique in its cluster; unset: this machine's name.",
    )
    weight: Bytes | None = Field(
        default=None,
        description="Share of the stripes, relative to other nodes; unset: the size of the cache.",
    )
    secret: SecretStr | None = Field(
        default=None,
        description="Shared secret of the cluster, at least 16 characters: requests are signed with it.",
    )
    secret_file: AbsolutePath | None = Field(default=None, description="File that holds `secret`.")
    tls_cert: AbsolutePath | None = Field(
        default=None,
        description="Certificate of this node (PEM, with its chain): mutual TLS instead of plain HTTP.",
    )
    tls_key: AbsolutePath | None = Field(default=None, description="Its key.")
    tls_ca: AbsolutePath | None = Field(
        default=None, description="Authority that signs the nodes' certificates, and nothing else."
    )
    tenant: str = Field(
        default="",
        description="Only nodes of the same tenant exchange blocks; give each tenant its own secret.",
    )
    stripe: Bytes = Field(
        default=16 << 20,
        ge=1 << 16,
        le=1 << 30,
        description="Consecutive bytes of a file that one node fetches.",
    )
    local_copies: Literal["all", "owned"] = Field(
        default="all",
        description="What a node keeps of what it reads: all of it, or only the stripes that are its own.",
    )
    connections: int = Field(
        default=1024,
        ge=1,
        le=65536,
        description="Most connections from other nodes at a time; further ones wait.",
    )
    streams: int = Field(
        default=256,
        ge=1,
        le=65536,
        description="Most answers under way at a time; further ones wait for their turn.",
    )
    congestion: str = Field(
        default="",
        pattern=r"^[a-z0-9_]{0,15}$",
        description="TCP congestion control of what is sent to other nodes; unset: the system's, but `cubic` where "
        "that is `bbr`.",
    )
    timeout: Seconds = Field(
        default=2.0, gt=0, description="A node that takes no connection for so long is passed over."
    )
    fallback: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Most requests to the origin, of all nodes together, for stripes whose node does not answer.",
    )

    @field_validator("node", "tenant")
    @classmethod
    def _check_plain_name(cls, name: str) -> str:
        if name and not NODE_NAME_PATTERN.fullmatch(name):
            raise ValueError(f"{name!r}: a name has letters, digits, '.', '_' and '-' only, at most 63")
        return name

    @field_validator("members", "etcd")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_normalize_node_url(url) for url in urls)

    @field_validator("advertise")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        return None if url is None else _normalize_node_url(url)

    @field_validator("dns")
    @classmethod
    def _check_host_and_port(cls, address: str) -> str:
        if address and not split_address(address)[0]:
            raise ValueError(f"{address!r} is not a name like fusecache.default.svc:7070")
        return address

    @model_validator(mode="after")
    def _check_consistency(self) -> PeerSettings:
        needed = {"static": "members", "dns": "dns", "etcd": "etcd"}.get(self.discovery)
        if needed and not getattr(self, needed):
            raise ValueError(f"discovery={self.discovery} needs {needed}")
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("secret and secret_file: drop one of them")
        if self.secret is not None and len(self.secret.get_secret_value()) < 16:
            raise ValueError("secret has to have at least 16 characters")
        tls = (self.tls_cert, self.tls_key, self.tls_ca)
        if any(tls) and not all(tls):
            raise ValueError("mutual TLS needs tls_cert, tls_key and tls_ca")
        if self.listen:
            host, _ = split_address(self.listen)
            if not (is_loopback(host) or self.secret or self.secret_file or self.tls_cert):
                raise ValueError(
                    f"listen={self.listen}: set secret, secret_file or tls_cert, or listen on 127.0.0.1: "
                    "nobody unauthenticated reads a block"
                )
        return self

    @property
    def is_enabled(self) -> bool:
        """Whether this node is part of a cluster."""
        return self.discovery != "none" or bool(self.listen)

    def secret_values(self) -> list[str]:
        """The secret values in here, for redaction."""
        return [self.secret.get_secret_value()] if self.secret is not None else []


def _normalize_node_url(url: str) -> str:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise ValueError(f"{url!r} is not a URL like http://10.0.0.1:7070")
    if parts.username is not None or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("a node's URL has a host and a port, and nothing else")
    return f"{parts.scheme}://{parts.netloc}".lower()


def _node_name_from_host(host: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", host).strip("-._")[:63] or "node"
