"""Manifests: the sha256 that a file has to have, and that no reader gets a file before it has that."""
