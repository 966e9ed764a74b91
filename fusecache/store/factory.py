"""The store that a mount's settings ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from fusecache.config.model import MountConfig
from fusecache.store.attestation import AttestationPolicy
from fusecache.store.interface import BlockStore
from fusecache.store.memory import MemoryDirectory
from fusecache.store.store import Store
from fusecache.store.tiers import TieredStore
from fusecache.types import ObjectVersion

_MEMORY_FREE_SHARE = 0.05
"""Share of the tmpfs that is left free: engines use it, too (NCCL, workers that share tensors)."""


@contextlib.contextmanager
def open_store(
    config: MountConfig,
    *,
    keep_objects: bool,
    attestation_policy: AttestationPolicy | None = None,
    is_spare: Callable[[ObjectVersion], bool] | None = None,
) -> Iterator[BlockStore]:
    """The store, which is closed as the context ends. `keep_objects`: an earlier daemon of this mount may have left
    objects in memory, which are still good. `is_spare(version)`: another node keeps a copy of the version for longer,
    so that this one is evicted first. Raises StoreError and ConfigError, in one line."""
    with ExitStack() as stack:
        memory = (
            None
            if config.store == "on"
            else _open_memory_store(
                config,
                stack,
                keep_objects=keep_objects,
                attestation_policy=attestation_policy,
                is_spare=is_spare,
            )
        )
        if memory is not None and config.store == "off":
            with contextlib.suppress(OSError):  # listings are kept there, if it can be had
                config.cache_dir.mkdir(mode=0o700)
            yield memory
            return
        disk = stack.enter_context(
            Store(
                config.cache_dir,
                limit=config.cache_limit_bytes(),
                free_floor=config.min_free_bytes(),
                block_size=config.block_size,
                verify=config.block_verify_mode(),
                attestation_policy=attestation_policy,
                is_spare=is_spare,
            )
        )
        if memory is None:
            yield disk
            return
        yield TieredStore(disk, memory, small_size=config.small_size)


def _open_memory_store(
    config: MountConfig,
    stack: ExitStack,
    *,
    keep_objects: bool,
    attestation_policy: AttestationPolicy | None,
    is_spare: Callable[[ObjectVersion], bool] | None,
) -> Store:
    limit = config.memory_limit_bytes()
    directory = MemoryDirectory(
        config.memory_dir,
        runtime_dir=config.runtime_dir,
        mountpoint=config.mountpoint,
        block_size=config.block_size,
        keep_objects=keep_objects,
    )
    stack.callback(directory.remove_directory)
    return stack.enter_context(
        Store(
            directory.path,
            limit=limit,
            free_floor=int(config.memory_dir_bytes() * _MEMORY_FREE_SHARE),
            block_size=config.block_size,
            verify=config.block_verify_mode(),
            attestation_policy=attestation_policy,
            is_spare=is_spare,
            is_in_memory=True,
        )
    )
