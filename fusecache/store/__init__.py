"""The node's block store: sparse files, block checksums, space accounting, eviction, pins."""

from fusecache.store.format import Mark
from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.interface import BlockStore
from fusecache.store.locks import Claim
from fusecache.store.making import open_store
from fusecache.store.object import StoredObject
from fusecache.store.orders import Orders
from fusecache.store.seals import Seals
from fusecache.store.store import Store

__all__ = [
    "BlockStore",
    "Claim",
    "Mark",
    "ObjectInfo",
    "Orders",
    "Seals",
    "Store",
    "StoreUsage",
    "StoredObject",
    "open_store",
]
