"""Block lookup, single flight, prefetch: brings object versions into the store, and wakes who waits."""

from fusecache.loader.interface import (
    Again,
    Expect,
    Inspector,
    Library,
    LoaderSettings,
    LoaderStats,
    Route,
    Supplier,
)
from fusecache.loader.load import ObjectLoad
from fusecache.loader.loader import Loader
from fusecache.loader.plan import is_shard
from fusecache.loader.recording import RecordingError, unpack
from fusecache.loader.waiters import Waiter

__all__ = [
    "Again",
    "Expect",
    "Inspector",
    "Library",
    "Loader",
    "LoaderSettings",
    "LoaderStats",
    "ObjectLoad",
    "RecordingError",
    "Route",
    "Supplier",
    "Waiter",
    "is_shard",
    "unpack",
]
