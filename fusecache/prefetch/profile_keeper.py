"""Access profiles of models: taken from the cache directory and from other nodes, and made of what was recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fusecache.locking import OwnedLock
from fusecache.prefetch.interface import PeerProfiles
from fusecache.prefetch.model_shards import LoadSession, ModelShards
from fusecache.prefetch.profiles.access_profile import ProfileError, pack_profile, unpack_profile
from fusecache.prefetch.profiles.profile_store import ProfileStore

_log = logging.getLogger(__name__)


@dataclass
class ProfileStats:
    """Counters since the start: profiles made, loads that followed one, loads that strayed from it, profiles that came
    from other nodes."""

    recorded: int = 0
    replayed: int = 0
    wrong: int = 0
    from_nodes: int = 0


class ProfileKeeper:
    """`lock`, the scheduling lock, guards the models and `stats`. Without a `profile_store` nothing is learned. All
    methods are called without the lock."""

    def __init__(
        self, lock: OwnedLock, profile_store: ProfileStore | None, peer_profiles: PeerProfiles | None
    ) -> None:
        self.stats = ProfileStats()
        self._lock = lock
        self._profile_store = profile_store
        self._peer_profiles = peer_profiles

    @property
    def is_learning(self) -> bool:
        """Whether profiles are made and followed."""
        return self._profile_store is not None

    @property
    def asks_peers(self) -> bool:
        """Whether there are other nodes that may have a profile."""
        return self._peer_profiles is not None

    def load_profile(self, model: ModelShards) -> None:
        """Give the model the profile that the cache directory has, if it has one. Does disk I/O."""
        data = self._profile_store.load_profile(model.id) if self._profile_store is not None else None
        if data is not None:
            self._adopt_packed(model, data, "in the cache directory")

    def fetch_from_peers(self, model: ModelShards) -> bool:
        """Give the model the profile that another node has, and keep that; returns whether one has it. Blocks for a
        second at most."""
        data = self._peer_profiles.find_profile(model.id) if self._peer_profiles is not None else None
        if data is None or not self._adopt_packed(model, data, "of another node"):
            return False
        self.stats.from_nodes += 1
        if self._profile_store is not None:
            self._profile_store.save_profile(model.id, data)
        return True

    def _adopt_packed(self, model: ModelShards, data: bytes, source_text: str) -> bool:
        """Whether these bytes are a profile of this model, which is followed from now on."""
        key = model.versions[0].key
        try:
            profile = unpack_profile(data)
        except ProfileError as error:
            _log.warning("the recording of %s %s is passed over: %s", key, source_text, error)
            return False
        with self._lock:
            is_adopted = model.adopt_profile(profile)
        if not is_adopted:
            _log.warning("the recording of %s %s is passed over: it is one of other files", key, source_text)
        return is_adopted

    def keep_recording(self, model: ModelShards, session: LoadSession) -> None:
        """Make what was recorded in a load that is over the model's profile, if it has none or a wrong one, and offer
        it to other nodes. Does disk I/O."""
        if (
            session.recorder is None
            or not session.is_cold
            or (model.profile is not None and not session.is_profile_wrong)
        ):
            return
        profile = session.recorder.make_profile(model.layouts)
        if profile is None or self._profile_store is None:
            return
        self._profile_store.save_profile(model.id, pack_profile(profile))
        with self._lock:
            model.adopt_profile(profile)
            self.stats.recorded += 1
        _log.info(
            "%s: recorded in which order it is read: %d of %d blocks, by %d processes",
            model.versions[0].key,
            profile.block_count,
            sum(model.block_counts),
            profile.rank_count,
        )
        if self._peer_profiles is not None:
            self._peer_profiles.offer_profile(model.id)
