"""S3-FIFO over object versions, weighted by bytes: which of them go when space is needed. Pure, not thread-safe.

Three queues (Yang et al., SOSP 2023). New objects enter `small`, which may hold a tenth of the bytes. At its
head an object that was used again moves to `main`, any other leaves and only its id is kept, in `ghost`; an
object that comes back while it is in `ghost` goes straight to `main`. At the head of `main` an object that
was used since gets another round, for each use (at most three). So a walk over everything, once, passes
through `small` and leaves `main` alone, and no list has to be reordered on a hit.

An object's first use is what brought it in: only the second and later ones count.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fusecache.bounded import BoundedDict
from fusecache.types import ObjectId

MAX_USES = 3
SMALL_SHARE = 0.1


@dataclass
class _Entry:
    size: int
    uses: int


class S3Fifo:
    """Order of eviction of the objects it was told of. Sizes are in bytes."""

    def __init__(self) -> None:
        self._small: OrderedDict[ObjectId, _Entry] = OrderedDict()
        self._main: OrderedDict[ObjectId, _Entry] = OrderedDict()
        self._ghost: BoundedDict[ObjectId, int] = BoundedDict(0, weigh=int)
        self._small_bytes = 0
        self._main_bytes = 0

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._small or object_id in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def add(self, object_id: ObjectId, size: int, *, uses: int = 0, is_in_main: bool = False) -> None:
        """Put an object at the end of its queue; one that is known already is only resized."""
        if object_id in self:
            self.resize(object_id, size)
            return
        was_ghost = self._ghost.pop(object_id, None) is not None
        self._push_entry(object_id, _Entry(size, min(uses, MAX_USES)), is_in_main or was_ghost)

    def resize(self, object_id: ObjectId, size: int) -> None:
        """Tell that an object takes `size` bytes now. Unknown ones are ignored."""
        if (entry := self._small.get(object_id)) is not None:
            self._small_bytes += size - entry.size
        elif (entry := self._main.get(object_id)) is not None:
            self._main_bytes += size - entry.size
        else:
            return
        entry.size = size

    def count_use(self, object_id: ObjectId) -> None:
        """Count a use. Unknown objects are ignored."""
        entry = self._small.get(object_id) or self._main.get(object_id)
        if entry is not None:
            entry.uses = min(entry.uses + 1, MAX_USES)

    def use_count(self, object_id: ObjectId) -> int:
        """Uses that still count in the object's favour, 0-3."""
        entry = self._small.get(object_id) or self._main.get(object_id)
        return entry.uses if entry else 0

    def is_in_main(self, object_id: ObjectId) -> bool:
        """Whether the object has proved its worth."""
        return object_id in self._main

    def remove(self, object_id: ObjectId, *, was_evicted: bool = False) -> None:
        """Forget an object; one that `was_evicted` is remembered in the ghost queue."""
        if object_id not in self:
            return
        entry = self._pop_entry(object_id)
        if was_evicted:
            self.add_ghost(object_id, entry.size)

    def add_ghost(self, object_id: ObjectId, size: int) -> None:
        """Put an id into the ghost queue, which spans as many bytes as the store holds."""
        self._ghost.set_maximum(max(self._main_bytes + self._small_bytes, size))
        self._ghost[object_id] = size

    def ghosts(self) -> Iterable[tuple[ObjectId, int]]:
        """Ids and sizes of the ghost queue, oldest first."""
        return self._ghost.items()

    def eviction_order(self) -> Iterator[ObjectId]:
        """All objects, `small` first, each queue from its head."""
        yield from self._small
        yield from self._main

    def victims(self, is_evictable: Callable[[ObjectId], bool]) -> Iterator[ObjectId]:
        """Objects to evict, in order; ends when nothing evictable is left.

        The caller evicts each before it asks for the next, and calls `remove`; one that it could not evict goes to the
        end of its queue. Objects that are not evictable when the walk comes to them keep
        their place and uses. The walk comes to no more objects than it needs: there may be tens of thousands.
        """
        small, main = deque(self._small), deque(self._main)
        while True:
            for queue in (small, main):
                while queue and not is_evictable(queue[0]):
                    queue.popleft()
            if not small and not main:
                return
            total = self._small_bytes + self._main_bytes
            from_small = bool(small) and (not main or self._small_bytes > SMALL_SHARE * total)
            object_id = (small if from_small else main).popleft()
            if object_id not in self:
                continue
            entry = self._pop_entry(object_id)
            if entry.uses == 0:
                self._push_entry(object_id, entry, is_in_main=not from_small)
                yield object_id
                continue
            entry.uses = 0 if from_small else entry.uses - 1
            self._push_entry(object_id, entry, is_in_main=True)
            main.append(object_id)

    def _pop_entry(self, object_id: ObjectId) -> _Entry:
        if (entry := self._small.pop(object_id, None)) is not None:
            self._small_bytes -= entry.size
            return entry
        entry = self._main.pop(object_id)
        self._main_bytes -= entry.size
        return entry

    def _push_entry(self, object_id: ObjectId, entry: _Entry, is_in_main: bool) -> None:
        if is_in_main:
            self._main[object_id] = entry
            self._main_bytes += entry.size
        else:
            self._small[object_id] = entry
            self._small_bytes += entry.size
