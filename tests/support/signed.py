"""Manifests of test objects: sums, and `model.sig` files as model-signing makes them.

`data/model.sig` is from the tool itself: `model_signing sign key` (1.1.1) of a folder whose files are
`content(name, 1, 0, size)` for the names and sizes in FILES; `data/model.pub` is the key.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_DATA = Path(__file__).with_name("data")
FILES = {
    "config.json": 29,
    "model-00001-of-00002.safetensors": (1 << 20) + 5,
    "model-00002-of-00002.safetensors": (1 << 20) + 5,
    "sub/ü tokenizer.json": 77,
}
SIGNATURE = _DATA / "model.sig"
PUBLIC_KEY = _DATA / "model.pub"
PAYLOAD_TYPE = "application/vnd.in-toto+json"


def sums(files: Mapping[str, bytes]) -> bytes:
    """A SHA256SUMS of these contents."""
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    return "".join(lines).encode()


def key_pair() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A private key, and its public part in PEM."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private, public


def statement(digests: Mapping[str, bytes]) -> dict[str, Any]:
    """The statement of model-signing about files with these digests."""
    resources = [
        {"name": name, "algorithm": "sha256", "digest": digest.hex()} for name, digest in digests.items()
    ]
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": whole}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": resources,
        },
    }


def sign(said: Any, private: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    """A sigstore bundle with this statement as its payload."""
    payload = json.dumps(said).encode()
    message = b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)
    signature = private.sign(message, ec.ECDSA(hashes.SHA256()))
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": ""}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


def signature_of(files: Mapping[str, bytes], private: ec.EllipticCurvePrivateKey) -> bytes:
    """A model.sig of these contents."""
    digests = {name: hashlib.sha256(data).digest() for name, data in files.items()}
    return json.dumps(sign(statement(digests), private)).encode()
