"""The store that a mount's settings ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, closing

from fusecache.config.model import MountConfig
from fusecache.store.interface import BlockStore
from fusecache.store.memory import MemoryDirectory
from fusecache.store.seals import Seals
from fusecache.store.store import Store
from fusecache.store.tiers import Meter, Tiers

_FLOOR = 0.05
"""Share of the tmpfs that is left free: engines have their own use for it (NCCL, workers that share tensors)."""


@contextlib.contextmanager
def open_store(config: MountConfig, *, keep: bool, seals: Seals | None = None) -> Iterator[BlockStore]:
    """The store, while this is entered. `keep`: an earlier daemon of this mount may have left objects in memory, which
    are still good. Raises StoreError and ConfigError, in one line."""
    with ExitStack() as stack:
        memory = None if config.store == "on" else _memory(config, stack, keep=keep, seals=seals)
        if memory is not None and config.store == "off":
            with contextlib.suppress(OSError):  # listings are kept there, if it can be had
                config.cache_dir.mkdir(mode=0o700)
            yield memory
            return
        floor = config.free_floor_bytes()
        disk = stack.enter_context(
            Store(
                config.cache_dir,
                limit=config.cache_limit(),
                free_floor=floor,
                block_size=config.block_size,
                verify=config.store_verify(),
                seals=seals,
            )
        )
        if memory is None:
            yield disk
            return
        meter = (
            stack.enter_context(closing(Meter(config.cache_dir, floor))) if config.store == "auto" else None
        )
        yield Tiers(disk, memory, small_size=config.small_size, meter=meter)


def _memory(config: MountConfig, stack: ExitStack, *, keep: bool, seals: Seals | None) -> Store:
    limit = config.memory_limit()
    directory = MemoryDirectory(
        config.memory_dir,
        runtime_dir=config.runtime_dir,
        mountpoint=config.mountpoint,
        block_size=config.block_size,
        keep=keep,
    )
    stack.callback(directory.remove)
    return stack.enter_context(
        Store(
            directory.path,
            limit=limit,
            free_floor=int(config.memory_dir_size() * _FLOOR),
            block_size=config.block_size,
            verify=config.store_verify(),
            seals=seals,
            in_memory=True,
        )
    )
