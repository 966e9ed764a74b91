"""Parts of the state of one fetch: its waiters, its pauses after failures, its inspection.

The scheduling lock guards all of it, but for what an inspector hashes.
"""

from __future__ import annotations

import hashlib

from fusecache.fetch.waiter import Waiter


class FetchWaiters:
    """The readers, and other nodes, that wait at one fetch.

    | Waiter | Event | Next state |
    |---|---|---|
    | unknown | `add` | waits for its missing blocks, or for the attestation |
    | waits | a block of it arrives, and it misses others | waits |
    | waits | its last block arrives | unknown, and returned by `block_arrived` |
    | waits | `drop`, `pop_attestation` | unknown |
    """

    def __init__(self) -> None:
        self.by_block: dict[int, list[Waiter]] = {}
        self.of_attestation: list[Waiter] = []
        """Readers that wait until all of the object is there and attested."""

    def __bool__(self) -> bool:
        return bool(self.by_block or self.of_attestation)

    def all(self) -> set[Waiter]:
        """Everything that waits here."""
        return {waiter for waiters in self.by_block.values() for waiter in waiters}.union(self.of_attestation)

    def add(self, waiter: Waiter) -> None:
        """`waiter` waits here from now on."""
        if waiter.awaits_attestation:
            self.of_attestation.append(waiter)
        for block in waiter.missing_blocks:
            self.by_block.setdefault(block, []).append(waiter)

    def drop(self, waiter: Waiter) -> None:
        """`waiter` does not wait here any more, if it did."""
        if waiter in self.of_attestation:
            self.of_attestation.remove(waiter)
        for block in waiter.missing_blocks:
            waiters = self.by_block.get(block)
            if waiters is not None and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self.by_block[block]

    def pop_attestation(self) -> list[Waiter]:
        """Those that wait for the attestation, which do not wait here any more."""
        waiters, self.of_attestation = self.of_attestation, []
        return waiters

    def block_arrived(self, block: int, piece: bytes | None) -> list[Waiter]:
        """A block is in the store, or only in `piece`: returns the waiters that have all of theirs now."""
        complete = []
        for waiter in self.by_block.pop(block, ()):
            waiter.block_arrived(block, piece)
            if not waiter.missing_blocks:
                complete.append(waiter)
        return complete

    def has_urgent(self, block: int) -> bool:
        """Whether a reader waits for this block."""
        return any(waiter.urgent for waiter in self.by_block.get(block, ()))


class Backoff:
    """When nothing of a file is fetched without a waiter.

    | State | Event | Next state |
    |---|---|---|
    | any | `hold`: an observer of reads wants a moment | paused |
    | any | `flight_failed` | paused, with one failure more |
    | any | `flight_succeeded` | as before, without failures |
    | paused | its time comes, or `end` | not paused |
    """

    def __init__(self) -> None:
        self.failure_count = 0
        """Failed flights in a row."""
        self.until = 0.0
        """No flight without a waiter before this time.monotonic()."""

    def hold(self, until: float) -> None:
        """Pause until this time.monotonic()."""
        self.until = until

    def flight_failed(self, now: float, seconds: float, max_steps: int) -> int:
        """Pause for `seconds` times the failures in a row, `max_steps` at most; returns how many there are now."""
        self.failure_count += 1
        self.until = now + seconds * min(self.failure_count, max_steps)
        return self.failure_count

    def flight_succeeded(self) -> None:
        """The next failure is the first of a row."""
        self.failure_count = 0

    def end(self) -> None:
        """Do not pause any longer."""
        self.until = 0.0


class Inspection:
    """How far the inspection of an unattested object has come: `hashed_blocks` blocks, which count for nothing if the
    store has found more bad blocks since than the `discards` at its beginning. The sha256 and the count belong to the
    thread that inspects while `is_under_way`.

    | State | Event | Next state |
    |---|---|---|
    | idle | `begin`: it is queued for an inspector | under way |
    | under way | `restart`: a block was found bad | under way, from the first block |
    | under way | `end` | idle, as far as it came |
    """

    def __init__(self) -> None:
        self.is_under_way = False
        self.sha256 = hashlib.sha256()
        self.hashed_blocks = 0
        self.discards = 0

    def begin(self) -> None:
        """It is queued for an inspector."""
        self.is_under_way = True

    def end(self) -> None:
        """The inspector has hashed what was there."""
        self.is_under_way = False

    def restart(self, discards: int) -> None:
        """Hash from the first block, after so many bad blocks."""
        self.sha256 = hashlib.sha256()
        self.hashed_blocks = 0
        self.discards = discards

    def add_block(self, data: memoryview) -> None:
        """Hash the next block."""
        self.sha256.update(data)
        self.hashed_blocks += 1
