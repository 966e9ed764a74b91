"""Which files make up which model, and which of their blocks its profile names."""

from __future__ import annotations

import time
from typing import NamedTuple

from fusecache.blocks import block_range
from fusecache.bounded import BoundedDict
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.prefetch.interface import CatalogView
from fusecache.prefetch.model_shards import ModelShards, is_worth_learning
from fusecache.prefetch.models.shard_order import files_in_folder, is_shard, shards_of_model
from fusecache.prefetch.profile_keeper import ProfileKeeper
from fusecache.types import ObjectId, ObjectVersion

_MAX_FILES = 20_000
_WHOLE_CHECK_SECONDS = 1.0
"""Seconds for which a model that was found complete in the store is taken to be so still."""


class ModelFile(NamedTuple):
    """A file of a model: its number in the model's access profile."""

    model: ModelShards
    number: int


class ModelRegistry:
    """Knows the models whose files were opened lately. The scheduling lock of the service guards the models, and the
    table of their files when it is changed; `find_file` reads it without the lock, since one look-up is one step."""

    def __init__(
        self, fetch_service: FetchService, catalog: CatalogView, keeper: ProfileKeeper, readahead_bytes: int
    ) -> None:
        self._fetch_service = fetch_service
        self._lock = fetch_service.lock
        self._catalog = catalog
        self._keeper = keeper
        self._readahead_bytes = readahead_bytes
        self._files: BoundedDict[ObjectId, ModelFile | None] = BoundedDict(_MAX_FILES)
        """None: nothing is learned of this one."""

    def find_file(self, object_id: ObjectId) -> ModelFile | None:
        """The model that this file is a part of; None: it is not known to be a part of one. Without the lock."""
        return self._files.get(object_id)

    def models_locked(self) -> list[ModelShards]:
        """All models, each once."""
        self._lock.assert_held()
        return list(
            {id(file.model): file.model for file in self._files.values() if file is not None}.values()
        )

    def attach_model(self, object_fetch: ObjectFetch) -> None:
        """A new fetch, of a shard perhaps: finds out which model it is a part of, and masks the blocks that the model's
        profile leaves out. Does disk I/O."""
        version = object_fetch.version
        if not is_shard(version.key):
            return
        with self._lock:
            is_known = version.id in self._files
        if not is_known:
            self._discover_model(version, object_fetch.source, object_fetch.stored.block_size)
        with self._lock:
            file = self._files.get(version.id)
            if file is not None:
                self.mask_locked(object_fetch, file)

    def mask_locked(self, object_fetch: ObjectFetch, file: ModelFile) -> bool:
        """Fetch of this file, without a waiter, only what the model's profile names, as long as that is followed;
        returns whether that leaves anything out."""
        self._lock.assert_held()
        # all of an unattested file has to be there before a reader gets any of it
        mask = None if object_fetch.stored.is_unattested else file.model.prefetch_mask_of(file.number)
        object_fetch.set_prefetch_mask(mask, file.model.readahead_slack)
        return mask is not None

    def _discover_model(self, version: ObjectVersion, source: str, block_size: int) -> None:
        versions = self.shards_with(version)
        model = None
        if version in versions and is_worth_learning(versions, block_size):
            model = ModelShards(source, versions, block_size, self._readahead_bytes, self._keeper.is_learning)
            self._keeper.load_profile(model)
        with self._lock:
            if model is None:
                self._files[version.id] = None
                return
            for number, other in enumerate(model.versions):
                file = self._files[other.id] = ModelFile(model, number)
                object_fetch = self._fetch_service.fetches.find_locked(other.id)
                if object_fetch is not None:
                    self.mask_locked(object_fetch, file)

    def shards_with(self, version: ObjectVersion) -> tuple[ObjectVersion, ...]:
        """The shards that this file belongs to, or announces, in the order of their keys. Asks the catalog."""
        names = files_in_folder(version, self._catalog.siblings(version))
        return tuple(names[name] for name in shards_of_model(version.key.rpartition("/")[2], list(names)))

    def is_stored_whole(self, model: ModelShards) -> bool:
        """Whether all files of a model are complete in the store, and it is not being loaded. Does disk I/O."""
        now = time.monotonic()
        with self._lock:
            if model.session is not None:
                return False
            if now - model.found_whole_at < _WHOLE_CHECK_SECONDS:
                return True
        if not all(self._fetch_service.store.has_whole(version) for version in model.versions):
            return False
        with self._lock:
            model.found_whole_at = now
            return model.session is None

    def record_read(self, object_fetch: ObjectFetch, offset: int, length: int, process_id: int) -> None:
        """A reader, of this process, asks for these bytes. Takes microseconds, and not the lock: the recorder of a load
        has a lock of its own."""
        file = self.find_file(object_fetch.version.id)
        if file is None:
            return
        file.model.last_read_at = time.monotonic()
        recorder = file.model.recorder
        if recorder is not None:
            blocks = block_range(offset, length, object_fetch.version.size, object_fetch.stored.block_size)
            recorder.record_read(file.number, blocks.start, blocks.stop, process_id)
