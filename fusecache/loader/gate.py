"""Sealed objects in the loader: who waits for one, and when the inspector is to look at it.

An object is sealed as long as nobody vouched for all of its bytes (see store.seals). Its blocks are fetched, stored and
passed on to other nodes, which look for themselves, like any others; but a reader waits until all of them are there and
were looked at. Looking begins while they arrive. All of it is guarded by the loader's lock, but for `look`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fusecache.errors import AttestationError, FusecacheError, StoreError
from fusecache.loader.board import Board
from fusecache.loader.interface import Inspector
from fusecache.loader.load import ObjectLoad
from fusecache.loader.waiters import Waiter, settle


class Gate:
    """Of one loader, whose `lock` and `waiters` these are. `completed` is told of loads that were opened up,
    `closable` asked whether one is to be closed."""

    def __init__(
        self,
        lock: threading.Lock,
        waiters: set[Waiter],
        board: Board,
        inspector: Inspector | None,
        *,
        patience: float,
        completed: Callable[[ObjectLoad], None],
        closable: Callable[[ObjectLoad], bool],
    ) -> None:
        self.moved = 0.0
        """When something landed, or was looked at, the last time."""
        self._lock = lock
        self._waiters = waiters
        self._board = board
        self._inspector = inspector
        self._patience = patience
        self._completed = completed
        self._closable = closable

    def meet(self, load: ObjectLoad) -> None:
        """A new load: one that is in quarantine is not fetched."""
        if load.stored.quarantined is not None:
            text = f"{load.version.key} is in quarantine: it is not what its manifest says"
            load.gone = AttestationError(text)

    def shall_look(self, load: ObjectLoad) -> bool:
        """Under the lock; to be followed by `look` without it."""
        if self._inspector is None or not load.to_look_at():
            return False
        load.looking = True
        load.jobs += 1
        return True

    def look(self, load: ObjectLoad, shall: bool) -> None:
        """Have the inspector look, if it shall."""
        if shall and self._inspector is not None:
            self._inspector.look(load)

    def looked(self, load: ObjectLoad, done: bool, error: FusecacheError | None = None) -> None:
        """The inspector has looked at what was there. `done`: at all of it, and it may be given to anybody, or not
        because of `error`. Takes the lock."""
        with self._lock:
            load.looking = False
            load.jobs -= 1
            self.moved = time.monotonic()
            if load.stored.quarantined is not None:
                load.gone = error
                self._board.retire(load)
            waiters = self.release(load) if done else []
            shall = self.shall_look(load)
            closing = self._closable(load)
        settle(waiters, error)
        if done and error is None:
            self._completed(load)
        self.look(load, shall)
        if closing:
            load.stored.close()

    def lift(self, load: ObjectLoad) -> None:
        """Its quarantine is over: it may be fetched again. Takes the lock."""
        load.stored.lift()
        with self._lock:
            load.gone = None

    def no_room(self, load: ObjectLoad) -> None:
        """What was fetched of it can't be stored, so that it will never be whole. Takes the lock."""
        with self._lock:
            waiters = self.release(load)
        text = f"{load.version.key} can't be checked: the cache has no room for all of it, or its disk fails"
        settle(waiters, StoreError(text))

    def release(self, load: ObjectLoad) -> list[Waiter]:
        """Under the lock: all who wait at the gate, to be settled."""
        waiters, load.behind_seal = load.behind_seal, []
        self._waiters.difference_update(waiters)
        return waiters

    def is_late(self, waiter: Waiter, now: float) -> bool:
        """Under the lock: whether a waiter's time is over. At the gate, where a whole file is waited for, it is not as
        long as anything moves."""
        load = waiter.load
        if waiter in load.behind_seal and (load.looking or load in self._board.active):
            return max(waiter.deadline, self.moved + self._patience) <= now
        return waiter.deadline <= now
