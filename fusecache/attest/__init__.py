"""Manifests: what the sha256 of a file has to be, and that nobody gets a file before it is that."""

from fusecache.attest.digests import UNSIGNED, Digests, Expected
from fusecache.attest.inspector import Inspector
from fusecache.attest.manifests import is_manifest
from fusecache.attest.signing import Key

__all__ = ["UNSIGNED", "Digests", "Expected", "Inspector", "Key", "is_manifest"]
