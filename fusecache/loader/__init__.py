"""Block lookup, single flight, prefetch: brings object versions into the store, and wakes who waits."""

from fusecache.loader.interface import Library, LoaderSettings, LoaderStats
from fusecache.loader.load import ObjectLoad
from fusecache.loader.loader import Loader
from fusecache.loader.plan import is_shard
from fusecache.loader.waiters import Waiter

__all__ = ["Library", "Loader", "LoaderSettings", "LoaderStats", "ObjectLoad", "Waiter", "is_shard"]
