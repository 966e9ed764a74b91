"""A recording on its way: the blocks it names, in its order. Guarded by the loader's lock; does no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from fusecache.loader.load import Job, ObjectLoad


class Replay:
    """`steps` are runs of blocks in the order in which they will be read. Hands each block out once; what a flight did
    not bring is left to those who wait for it, or to `again`."""

    def __init__(self, steps: Sequence[tuple[ObjectLoad, range]]) -> None:
        self._steps = steps
        self._cursors = [0, 0]
        """Per kind (0: from the origin or the disk, 1: from nodes), the first step that may have an idle block."""
        last = {load.version.id: (at, load) for at, (load, _) in enumerate(steps)}
        self.loads = [load for _, load in sorted(last.values(), key=lambda pair: pair[0])]
        """In the order in which they will be whole."""

    def take(self, limit: int, remote: bool, now: float) -> Job | None:
        """The next flight of at most `limit` blocks: of what comes from other nodes, or of the rest."""
        at = self._cursors[remote]
        while at < len(self._steps):
            load, blocks = self._steps[at]
            if load.resting_until > now:
                break
            block = load.idle.find(1, blocks.start, blocks.stop) if load.gone is None else -1
            while block >= 0 and load.is_remote(block) is not remote:
                block = load.idle.find(1, block + 1, blocks.stop)
            if block >= 0:
                self._cursors[remote] = at
                return load.take(block, min(limit, blocks.stop - block))
            at += 1
        self._cursors[remote] = at
        return None

    @property
    def done(self) -> bool:
        """Whether everything was handed out, and is back."""
        return min(self._cursors) >= len(self._steps) and not any(load.jobs for load in self.loads)

    def again(self) -> None:
        """A flight failed: look through all of it once more."""
        self._cursors = [0, 0]

    def before(self, load: ObjectLoad) -> int:
        """Bytes that will come before the last of this load's, its own included; all of them if it is not in here."""
        total = 0
        for other in self.loads:
            total += other.stored.missing * other.stored.block_size
            if other is load:
                break
        return total
