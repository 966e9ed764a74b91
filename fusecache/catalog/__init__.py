"""Object listings as a directory tree: names, attributes, stable inode numbers and versions, all from memory."""

from fusecache.catalog.catalog import Catalog, Changes
from fusecache.catalog.entry import ROOT, CatalogSource, Entry

__all__ = ["ROOT", "Catalog", "CatalogSource", "Changes", "Entry"]
