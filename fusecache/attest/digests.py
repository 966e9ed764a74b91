"""The sha256 that a file has to have, from its manifests or from the origin.

Without a key: all manifests beside and above the file that name it, which have to agree; if none does, the metadata
that the origin has of the object. With a key: the `model.sig` files that were signed with it, and nothing else. A
manifest that can't be understood is passed over when another one names the file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from fusecache.attest.manifests import MAX_MANIFEST_BYTES, manifest_keys, parse_manifest
from fusecache.attest.signing import ManifestKey
from fusecache.bounded import BoundedDict
from fusecache.errors import AttestationError, UnavailableError, VersionChangedError
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_MAX_MANIFEST_ENTRIES = 1_000_000
"""Entries of manifests that are remembered."""
_MAX_METADATA_DIGESTS = 100_000

UNSIGNED = b"unsigned"
"""The trust anchor, which the store keeps with an attestation, of one that needed no key; with a key it is
`ManifestKey.anchor`."""


@dataclass(frozen=True)
class ExpectedDigest:
    """The digest that a file has to have, and the manifest that says so, in words."""

    sha256: bytes
    stated_by: str


class ManifestReplacedError(UnavailableError):
    """A manifest is being replaced: read it again."""


class ExpectedDigests:
    """Thread-safe; the lock is a leaf. May wait for the origin.

    `find_object(version, key)` is the object `key` of the same source, if there is one; `read_object(version, source)`
    its bytes; `read_metadata_sha256(version, source)` the sha256 that the origin's metadata has of it.
    """

    def __init__(
        self,
        find_object: Callable[[ObjectVersion, str], ObjectVersion | None],
        read_object: Callable[[ObjectVersion, str], bytes],
        read_metadata_sha256: Callable[[ObjectVersion, str], bytes | None],
        key: ManifestKey | None = None,
    ) -> None:
        self._find_object = find_object
        self._read_object = read_object
        self._read_metadata_sha256 = read_metadata_sha256
        self._key = key
        self._lock = threading.Lock()
        self._manifests: BoundedDict[ObjectId, dict[str, bytes] | str] = BoundedDict(
            _MAX_MANIFEST_ENTRIES, weigh=len
        )
        """The digests of a manifest, or the reason why it is no manifest."""
        self._metadata_digests: BoundedDict[ObjectId, bytes | None] = BoundedDict(_MAX_METADATA_DIGESTS)

    def forget_metadata(self) -> None:
        """Ask the origin again."""
        with self._lock:
            self._metadata_digests.clear()

    def find_expected(self, version: ObjectVersion, source: str) -> ExpectedDigest:
        """The digest that this version has to have. May wait for the origin. Raises AttestationError when no manifest
        names the file, or two say different things, ManifestReplacedError, and what reading a manifest raises."""
        found: list[ExpectedDigest] = []
        problems: list[str] = []
        for key in manifest_keys(version.key, is_signed=self._key is not None):
            manifest = self._find_object(version, key)
            if manifest is None or manifest.size > MAX_MANIFEST_BYTES:
                continue
            said = self._digests_of_manifest(manifest, source)
            if isinstance(said, str):
                problems.append(f"{key}: {said}")
            elif version.key in said:
                found.append(ExpectedDigest(said[version.key], key))
        if not found and self._key is None:
            digest = self._digest_from_metadata(version, source)
            if digest is not None:
                found.append(ExpectedDigest(digest, "the origin's metadata"))
        if not found:
            raise AttestationError(_unattested_text(version, problems, signed=self._key is not None))
        other = next((each for each in found if each.sha256 != found[0].sha256), None)
        if other is not None:
            raise AttestationError(
                f"{version.key}: {found[0].stated_by} and {other.stated_by} say different things of it: "
                "mend or remove one of them"
            )
        return found[0]

    def _digests_of_manifest(self, manifest: ObjectVersion, source: str) -> dict[str, bytes] | str:
        with self._lock:
            known = self._manifests.get(manifest.id)
        if known is not None:
            return known
        said: dict[str, bytes] | str
        try:
            said = parse_manifest(manifest.key, self._read_object(manifest, source), self._key)
        except VersionChangedError as error:
            raise ManifestReplacedError(f"{manifest.key} is being replaced: try again") from error
        except ValueError as error:
            said = str(error)[:300]
            _log.warning("%s is no manifest that can be used: %s", manifest.key, said)
        with self._lock:
            self._manifests[manifest.id] = said
        return said

    def _digest_from_metadata(self, version: ObjectVersion, source: str) -> bytes | None:
        with self._lock:
            if version.id in self._metadata_digests:
                return self._metadata_digests[version.id]
        digest = self._read_metadata_sha256(version, source)
        with self._lock:
            self._metadata_digests[version.id] = digest
        return digest


def _unattested_text(version: ObjectVersion, problems: list[str], *, signed: bool) -> str:
    if problems:
        return f"{version.key} is attested by nobody: {'; '.join(problems[:3])}"
    if signed:
        return f"{version.key} is in no model.sig that was signed with manifest_key: sign the model with it"
    return (
        f"{version.key} is in no manifest, and the origin has no sha256 of it: "
        "add it to SHA256SUMS or model.sig, or mount without verify=manifest"
    )
