"""The proofs of membership that a node has: the cluster's shared secret, and certificates."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from fusecache.config.peer_settings import PeerSettings
from fusecache.errors import ConfigError
from fusecache.peers.transport.auth import RequestSigner, RequestVerifier


@dataclass(frozen=True)
class Credentials:
    """Both ends' part of it; None where the settings ask for none. Nodes are known by the authority that signed their
    certificates, not by their host names."""

    signer: RequestSigner | None
    verifier: RequestVerifier | None
    client_tls: ssl.SSLContext | None
    server_tls: ssl.SSLContext | None
    """With mutual TLS the server lets in only clients that have a certificate of the cluster."""


def load_credentials(settings: PeerSettings) -> Credentials:
    """Reads the files that the settings name. Raises ConfigError when one of them can't be used."""
    secret = load_shared_secret(settings)
    return Credentials(
        None if secret is None else RequestSigner(secret, settings.node, settings.tenant),
        None if secret is None else RequestVerifier(secret, settings.tenant),
        make_tls_context(settings, ssl.PROTOCOL_TLS_CLIENT),
        make_tls_context(settings, ssl.PROTOCOL_TLS_SERVER),
    )


def load_shared_secret(settings: PeerSettings) -> str | None:
    """The cluster's secret, from the settings or its file; None: requests are not signed. Raises ConfigError."""
    if settings.secret is not None:
        return settings.secret.get_secret_value()
    if settings.secret_file is None:
        return None
    try:
        text = settings.secret_file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"peers.secret_file {settings.secret_file}: {reason}") from None
    if len(text) < 16:
        raise ConfigError(f"peers.secret_file {settings.secret_file}: at least 16 characters are needed")
    return text


def make_tls_context(settings: PeerSettings, protocol: int) -> ssl.SSLContext | None:
    """Mutual TLS for one end, ssl.PROTOCOL_TLS_CLIENT or _SERVER; None: plain HTTP. Raises ConfigError."""
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: b"")
        context.load_verify_locations(settings.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"peers.tls_cert {settings.tls_cert}, peers.tls_key {settings.tls_key} and peers.tls_ca "
            f"{settings.tls_ca} can't be used: {error.strerror or error}"
        ) from None
    return context
