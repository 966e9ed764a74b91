"""Which files are manifests, which of them may name a file, and what they say. Pure.

| name | names |
|---|---|
| `NAME.sha256`, `NAME.sha256sum` | the file NAME beside it |
| SUMS | files of its folder and below |
| `model.sig` | files of its folder and below |

Everybody may read a manifest, and no manifest is attested itself: it is worth as much as its signature, if one is
asked for, or as the people who may write to the source.
"""

from __future__ import annotations

from collections.abc import Iterator

from fusecache.attest.signing import ManifestKey, parse_signature
from fusecache.attest.sums import parse_single, parse_sums
from fusecache.types import ObjectVersion

SUMS_NAMES = (
    "SHA256SUMS",
    "SHA256SUMS.txt",
    "sha256sums",
    "sha256sums.txt",
    "sha256sum.txt",
    "checksums.sha256",
    "checksum.sha256",
)
SIGNATURE_NAME = "model.sig"
SINGLE_SUFFIXES = (".sha256", ".sha256sum")
MAX_MANIFEST_BYTES = 32 << 20
"""Bytes of a manifest: some 300,000 files. A larger one is a file like any other."""


def is_manifest(version: ObjectVersion) -> bool:
    """Whether a file is a manifest by its name and size."""
    name = version.key.rpartition("/")[2]
    return (
        name in SUMS_NAMES or name == SIGNATURE_NAME or name.endswith(SINGLE_SUFFIXES)
    ) and version.size <= MAX_MANIFEST_BYTES


def manifest_keys(key: str, *, is_signed: bool) -> Iterator[str]:
    """Keys of the manifests that may name the file `key`, the nearest first; `is_signed`: of signed ones."""
    if not is_signed:
        yield from (key + suffix for suffix in SINGLE_SUFFIXES)
    folder = key
    while folder:
        folder = folder.rpartition("/")[0]
        above = folder + "/" if folder else ""
        yield above + SIGNATURE_NAME
        if not is_signed:
            yield from (above + name for name in SUMS_NAMES)


def parse_manifest(key: str, text: bytes, required_key: ManifestKey | None) -> dict[str, bytes]:
    """The digests in the manifest `key`, by the key of the file. Raises ValueError, with what is wrong with it."""
    folder, _, name = key.rpartition("/")
    above = folder + "/" if folder else ""
    if name == SIGNATURE_NAME:
        found = parse_signature(text, required_key)
    elif name in SUMS_NAMES:
        found = parse_sums(text)
    else:
        about = name.removesuffix(SINGLE_SUFFIXES[1]).removesuffix(SINGLE_SUFFIXES[0])
        found = {about: parse_single(text, about)}
    return {above + file: digest for file, digest in found.items()}
