"""The node's block store: sparse files, block checksums, space accounting, eviction, pins."""
