"""fusecache: object storage as a POSIX mount, read at the speed of the local disk."""

__version__ = "0.1.0"
