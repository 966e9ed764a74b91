"""OpenSSF model signing: the `model.sig` that is distributed in a model's folder. No I/O.

It is a sigstore bundle, a JSON object, whose DSSE envelope holds an in-toto statement. In version 1.0 of the predicate
the files of the model, with their digests, are `predicate.resources`, and the one subject is the model as a whole: the
sha256 of all the resources' digests. Other statements name the files as their subjects.

The signature is verified with a public key (EC, as `model_signing sign key` has them) where one is given. Without one
the digests are taken as they are: certificates and sigstore identities are not looked at.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fusecache.attest.sums import add_digest, normalize_name

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_STATEMENT_TYPE = "https://in-toto.io/Statement/"
_HASH_BY_CURVE: Mapping[str, type[hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}


class ManifestKey:
    """A public key that manifests have to be signed with."""

    def __init__(self, pem: bytes) -> None:
        """Raises ValueError for anything but an EC public key on P-256, P-384 or P-521 in PEM."""
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError("is no public key in PEM") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASH_BY_CURVE:
            raise ValueError("is no EC key on P-256, P-384 or P-521")
        self._key = key
        self._hash = _HASH_BY_CURVE[key.curve.name]()
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.anchor = hashlib.sha256(der).digest()[:8]

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        """Whether this is a signature of `message` by this key."""
        try:
            self._key.verify(signature, message, ec.ECDSA(self._hash))
        except InvalidSignature:
            return False
        return True


def parse_signature(text: bytes, key: ManifestKey | None) -> dict[str, bytes]:
    """Digests by name, relative to the folder of the file; with a `key`, only if it signed them. Raises ValueError."""
    try:
        bundle = json.loads(text)
        envelope = _get_mapping(bundle, "dsseEnvelope")
        payload = _decode_base64(envelope.get("payload"))
        if envelope.get("payloadType") != PAYLOAD_TYPE:
            raise ValueError("its payload is no in-toto statement")
        if key is not None:
            _verify_envelope(envelope, payload, key)
        return _parse_statement(json.loads(payload))
    except RecursionError:
        raise ValueError("it is no JSON that can be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg}") from None


def _verify_envelope(envelope: Mapping[str, Any], payload: bytes, key: ManifestKey) -> None:
    kind = PAYLOAD_TYPE.encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    for item in _get_list(envelope, "signatures")[:16]:
        if key.has_signed(message, _decode_base64(item.get("sig") if isinstance(item, Mapping) else None)):
            return
    raise ValueError("it was not signed with manifest_key")


def _parse_statement(statement: Any) -> dict[str, bytes]:
    kind = statement.get("_type") if isinstance(statement, Mapping) else None
    if not isinstance(kind, str) or not kind.startswith(_STATEMENT_TYPE):
        raise ValueError("its payload is no in-toto statement")
    subjects = _get_list(statement, "subject")
    if statement.get("predicateType") != PREDICATE_TYPE:
        return _parse_subjects(subjects)
    predicate = _get_mapping(statement, "predicate")
    method = _get_mapping(predicate, "serialization").get("method")
    if method != "files":
        raise ValueError(f"it was made with the method {str(method)[:40]!r}: sign the model by files")
    found: dict[str, bytes] = {}
    whole = hashlib.sha256()
    for item in _get_list(predicate, "resources"):
        if not isinstance(item, Mapping) or item.get("algorithm") != "sha256":
            raise ValueError("its digests are not sha256: sign the model with that")
        digest = _parse_sha256(item.get("digest"))
        whole.update(digest)
        add_digest(found, _parse_name(item), digest)
    if [_subject_digest(subject) for subject in subjects] != [whole.digest()]:
        raise ValueError("its digests are not those of the model it is about")
    return found


def _parse_subjects(subjects: Sequence[Any]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for subject in subjects:
        add_digest(found, _parse_name(subject), _subject_digest(subject))
    return found


def _subject_digest(subject: Any) -> bytes:
    return _parse_sha256(_get_mapping(subject, "digest").get("sha256"))


def _parse_name(item: Any) -> str:
    name = item.get("name") if isinstance(item, Mapping) else None
    if not isinstance(name, str):
        raise ValueError("a file in it has no name")
    return normalize_name(name)


def _parse_sha256(text: Any) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except (TypeError, ValueError):
        digest = b""
    if len(digest) != 32:
        raise ValueError("a file in it has no sha256")
    return digest


def _get_mapping(value: Any, name: str) -> Mapping[str, Any]:
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"it has no {name}")
    return found


def _get_list(value: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = value.get(name)
    if not isinstance(found, list):
        raise ValueError(f"it has no {name}")
    return found


def _decode_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("it has something that is no base64") from None
