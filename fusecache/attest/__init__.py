"""Manifests: what the sha256 of a file has to be, and that nobody gets a file before it is that."""
