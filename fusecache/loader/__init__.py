"""Block lookup, single flight, prefetch: brings object versions into the store, and wakes who waits."""

from fusecache.loader.load import ObjectLoad
from fusecache.loader.loader import Library, Loader, LoaderSettings, LoaderStats
from fusecache.loader.waiters import Waiter

__all__ = ["Library", "Loader", "LoaderSettings", "LoaderStats", "ObjectLoad", "Waiter"]
