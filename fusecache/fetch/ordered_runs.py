"""An order in which blocks of several files are fetched. Guarded by the scheduling lock; does no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch


class OrderedRuns:
    """`runs` are runs of blocks in the order in which they will be read. Each block is handed out once; a block that
    its flight did not bring is fetched for its waiters, or after `rewind`. All methods are called with the scheduling
    lock.

    | Event | Position, for blocks from other nodes and for the rest |
    |---|---|
    | a search finds no idle block of its kind in a run | behind that run |
    | a flight failed (`rewind`) | at the beginning |
    """

    def __init__(self, runs: Sequence[tuple[ObjectFetch, range]]) -> None:
        self._runs = runs
        self._positions = [0, 0]
        """Per kind (0: from the origin or the disk, 1: from nodes), the first run that may have an idle block."""
        last = {object_fetch.version.id: (at, object_fetch) for at, (object_fetch, _) in enumerate(runs)}
        self.fetches = [object_fetch for _, object_fetch in sorted(last.values(), key=lambda pair: pair[0])]
        """In the order in which they will be complete."""

    def next_flight(self, max_flight_blocks: int, remote: bool, now: float) -> FlightPlan | None:
        """The next flight of at most `max_flight_blocks`: of blocks that come from other nodes, or of the rest; None:
        there is none now."""
        at = self._positions[remote]
        while at < len(self._runs):
            object_fetch, blocks = self._runs[at]
            if object_fetch.backoff.until > now:
                break
            block = (
                object_fetch.idle.find(1, blocks.start, blocks.stop)
                if object_fetch.gone_error is None
                else -1
            )
            while block >= 0 and object_fetch.is_remote(block) is not remote:
                block = object_fetch.idle.find(1, block + 1, blocks.stop)
            if block >= 0:
                self._positions[remote] = at
                return object_fetch.plan_flight(block, min(max_flight_blocks, blocks.stop - block))
            at += 1
        self._positions[remote] = at
        return None

    @property
    def is_done(self) -> bool:
        """Whether all blocks were handed out, and no flight of these fetches is under way."""
        return min(self._positions) >= len(self._runs) and not any(
            object_fetch.flight_count for object_fetch in self.fetches
        )

    def rewind(self) -> None:
        """A flight failed: look through all of it once more."""
        self._positions = [0, 0]

    def bytes_until_complete(self, object_fetch: ObjectFetch) -> int:
        """Bytes that will come before the last of this fetch's, its own included; all bytes if it is not in here."""
        total = 0
        for other in self.fetches:
            total += other.stored.missing_block_count * other.stored.block_size
            if other is object_fetch:
                break
        return total
