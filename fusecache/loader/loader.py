"""The loader: one fetch per block, whole files on their first read, then the shards behind them.

Readers ask for bytes that are not there (`request`) and are told when they are; a fixed
crew of threads (crew.py) flies. A free thread takes, in this order: a block a reader waits for, with the idle
blocks behind it up to `range_bytes`; a block that another node's prefetch waits for; the next run ahead of a
reader, of each file in turn; a file of the prefetch plan. A waiter is woken when its own blocks are in, by the
thread that landed the last of them.

Ownership: `_lock` guards all scheduling state (loads, waiters, queues) and is held for microseconds, never
across I/O or a callback. A reader that goes away cancels no flight: others may wait for it.

Interleavings worth knowing. (1) A block lands between a reader's look at the store and its `request`: request
looks again under the lock that `land` takes, so it is found there. (2) A block is found bad while somebody
reads it: the file is not rewritten in place while others have it open (see store). (3) A flight fails while new
readers join: those that came after its start fly again, the others get its error.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fusecache.blocks import block_range
from fusecache.errors import (
    AccessDeniedError,
    CancelledReadError,
    FusecacheError,
    OriginError,
    StoreError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.loader import flight
from fusecache.loader.ahead import Ahead
from fusecache.loader.alongside import Alongside
from fusecache.loader.board import Board
from fusecache.loader.crew import Crew
from fusecache.loader.gate import Gate
from fusecache.loader.gather import gather, read
from fusecache.loader.interface import (
    Inspector,
    Library,
    LoaderSettings,
    LoaderStats,
    OriginSupplier,
    Others,
    Route,
    Shelf,
    Supplier,
)
from fusecache.loader.learning import Learning
from fusecache.loader.load import Job, ObjectLoad
from fusecache.loader.waiters import Waiter, settle
from fusecache.store.interface import BlockStore
from fusecache.store.pace import Pace
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from fusecache.origin.base import Origin

_log = logging.getLogger(__name__)

_LOOK_AGAIN = 0.02
"""Seconds between looks at blocks that another process fetches."""
_REST = 5.0
"""Seconds without flights nobody waits for after one failed; grows with the failures."""
_GIVE_UP = 5
"""Failed flights in a row after which a file nobody has open is left as it is."""
_SLOW = 256 << 20
"""Bytes per second up to which the daemon keeps up with what arrives: then its readers can be listened to."""


class Loader:
    """Brings object versions into `store` from `origins` (by source name), or where `supplier` has them.
    Thread-safe; `start` and `close`, or a with block, own the crew."""

    def __init__(
        self,
        store: BlockStore,
        origins: Mapping[str, Origin],
        library: Library,
        settings: LoaderSettings,
        supplier: Supplier | None = None,
        shelf: Shelf | None = None,
        others: Others | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        self.store = store
        self.stats = LoaderStats()
        self._supplier: Supplier = supplier or OriginSupplier(origins)
        self._library = library
        self._settings = settings
        self.lock = self._lock = threading.Lock()
        self._crew = Crew(self._lock, self)
        self._wake_clock = threading.Condition(self._lock)
        self._loads: dict[ObjectId, ObjectLoad] = {}
        limit = max(1, settings.range_bytes // store.block_size)
        self._board = Board(
            limit,
            lambda *file: self._ahead.begin(*file),
            crew=settings.concurrency,
            abreast=self._supplier.abreast,
        )
        self._ahead = Ahead(self, self._board, library, settings.budget)
        self._along = Alongside(library, self._ahead.begin)
        self.learning = Learning(self, self._board, library, settings, self._ahead, shelf, others)
        self._pace = Pace()
        self._waiters: set[Waiter] = set()
        self.gate = Gate(
            self._lock,
            self._waiters,
            self._board,
            inspector,
            patience=settings.deadline,
            completed=lambda load: library.completed(load.version),
            closable=self._closable,
        )
        self._stopping = False
        self._clock_thread = threading.Thread(target=self._clock, name="loader-clock", daemon=True)

    # -- life

    def start(self) -> None:
        """Start the crew."""
        self._crew.start(self._settings.concurrency, self._supplier.crew)
        self._clock_thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Stop the crew: flights are cancelled, waiters get CancelledReadError. Waits `timeout` seconds at most."""
        self.learning.close()
        with self._lock:
            self._stopping = True
            waiters = list(self._waiters)
            for waiter in waiters:
                self._forget(waiter)
            self._crew.dismiss()
            self._wake_clock.notify_all()
        settle(waiters, CancelledReadError("the mount is going away"))
        deadline = time.monotonic() + timeout
        self._crew.join(deadline)
        if self._clock_thread.is_alive():
            self._clock_thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            loads = list(self._loads.values())
            self._loads.clear()
        for load in loads:
            load.stored.close()

    def __enter__(self) -> Loader:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- readers

    def open(self, version: ObjectVersion, source: str) -> ObjectLoad:
        """The load of this version, opened once more; does disk I/O. Pair with `release`."""
        load = self.obtain(version, source)
        load.stored.touch()
        return load

    def again(self, load: ObjectLoad) -> bool:
        """Open an open load once more, without I/O; False: it is out of date."""
        with self._lock:
            still = self._loads.get(load.version.id) is load and not load.stored.retired
            load.opens += still
        return still

    def obtain(self, version: ObjectVersion, source: str) -> ObjectLoad:
        """See Office."""
        with self._lock:
            load = self._loads.get(version.id)
            if load is not None and not load.stored.retired:
                load.opens += 1
                return load
        stored = self.store.open(version)
        fresh = ObjectLoad(version, source, stored)
        self.gate.meet(fresh)
        fresh.follow(self._supplier.route(version, stored.block_size))
        self.learning.attach(fresh)
        with self._lock:
            load = self._loads.get(version.id)
            if load is None or load.stored.retired:
                load = self._loads[version.id] = fresh
            load.opens += 1
        if load is not fresh:
            stored.close()
        return load

    def reroute(self) -> None:
        """Nodes came or went: ask the supplier anew where the stripes come from."""
        with self._lock:
            loads = list(self._loads.values())
        routes: list[tuple[ObjectLoad, Route | None]] = [
            (load, self._supplier.route(load.version, load.stored.block_size)) for load in loads
        ]
        with self._lock:
            for load, route in routes:
                load.follow(route)
                self._call_for(load, list(load.waiting))
            self._crew.call_all()

    def release(self, load: ObjectLoad) -> None:
        """Drop one open. What was begun goes on."""
        with self._lock:
            load.opens -= 1
            closing = self._closable(load)
        if closing:
            load.stored.close()

    def _closable(self, load: ObjectLoad) -> bool:
        """Whether this call took it out of the table, so that the caller has to close it."""
        if not load.unwanted() or self._board.holds(load):
            return False
        if self._loads.get(load.version.id) is load:
            del self._loads[load.version.id]
            return True
        return load.stored.retired

    def request(
        self,
        load: ObjectLoad,
        offset: int,
        length: int,
        settled: Callable[[Waiter], None],
        *,
        whole: bool = True,
        urgent: bool = True,
        head: bool = False,
    ) -> Waiter | None:
        """Ask for bytes. None: they are in the store; otherwise `settled` will be called (see Waiter). Raises the
        error that this version can't be had any more. `whole`: a reader asks, so fetch all of the file, and give
        nothing of a sealed one before it was vouched for (see gate.py). `urgent`: it goes before what nobody waits for,
        and before other nodes' prefetch. `head`: nobody waits for it."""
        stored = load.stored
        blocks = block_range(offset, length, load.version.size, stored.block_size)
        with self._lock:
            first = whole and not load.read
            if whole:
                load.read = load.being_read = True
                load.position = blocks.stop
            sealed = whole and stored.sealed
            missing = [block for block in blocks if not stored.present(block)]
            waiter = None
            if missing and whole:
                self.learning.asked(load, missing)
            if missing or sealed:
                waiter = self._wait(
                    load, offset, length, missing, settled, head=head, urgent=urgent, sealed=sealed
                )
            if first:
                self._want_all(load)
            look = self.gate.shall_look(load)
        self.gate.look(load, look)
        if first:
            self.follow(load.version, load.source)
        return waiter

    def request_head(
        self, load: ObjectLoad, offset: int, length: int, settled: Callable[[Waiter], None]
    ) -> Waiter | None:
        """See Office."""
        return self.request(load, offset, length, settled, whole=False, urgent=False, head=True)

    def await_seal(self, load: ObjectLoad, settled: Callable[[Waiter], None]) -> Waiter | None:
        """Somebody opens an object: if it is sealed, fetch all of it, have it looked at, and call `settled` then. None:
        it is not. Raises as `request`."""
        with self._lock:
            if not load.stored.sealed:
                return None
            load.read = True
            waiter = self._wait(load, 0, 0, (), settled, sealed=True)
            look = self.gate.shall_look(load)
        self.gate.look(load, look)
        self.follow(load.version, load.source)
        return waiter

    def _wait(
        self,
        load: ObjectLoad,
        offset: int,
        length: int,
        missing: Sequence[int],
        settled: Callable[[Waiter], None],
        *,
        head: bool = False,
        **more: bool,
    ) -> Waiter:
        """Under the lock. `more` is for Waiter. Raises as `request`."""
        if load.gone is not None or self._stopping:
            raise load.gone or CancelledReadError("the mount is going away")
        now = time.monotonic()
        deadline = now + self._settings.deadline
        waiter = Waiter(
            load, offset, length, missing=missing, since=now, deadline=deadline, settled=settled, **more
        )
        self._waiters.add(waiter)
        if load.wait(waiter):
            self._board.activate(load)
            self._crew.call_all()
        self._call_for(load, waiter.missing, head=head)
        if len(self._waiters) == 1:
            self._wake_clock.notify()
        return waiter

    def coming(self, load: ObjectLoad, blocks: range) -> bool:
        """Whether each of these blocks is in the store or on its way."""
        with self._lock:
            return all(not load.idle[block] or load.stored.unverified(block) for block in blocks)

    def cancel(self, waiter: Waiter) -> bool:
        """Nobody wants this any more; False: it was, or is being, settled."""
        with self._lock:
            if waiter not in self._waiters:
                return False
            self._forget(waiter)
            return True

    def waits(self, waiter: Waiter) -> bool:
        """Whether it is unsettled."""
        with self._lock:
            return waiter in self._waiters

    def read(self, load: ObjectLoad, offset: int, length: int) -> bytes:
        """See gather.read."""
        return read(self, load, offset, length)

    def copy_out(
        self, load: ObjectLoad, offset: int, length: int, pieces: Mapping[int, bytes]
    ) -> bytes | None:
        """Present bytes, some of them from a waiter's pieces; None: the disk did not give them."""
        data = gather(load.stored, offset, length, pieces)
        if isinstance(data, int):
            self.suspect(load, data)
            return None
        return data

    def suspect(self, load: ObjectLoad, block: int) -> None:
        """The disk did not give a present block: look at it again, and fetch it anew if it is bad."""
        if not load.stored.verify(block):
            with self._lock:
                load.idle[block] = 1
                self._call_for(load, [block] if block in load.waiting else [])

    def want(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Fetch these versions (of these sources), in this order, without a reader."""
        self._ahead.want(versions)

    def hurry(self, load: ObjectLoad) -> None:
        """Somebody is going to read all of this: fetch it, and then what follows."""
        with self._lock:
            load.read = True
            if load.failures:
                return
            self._want_all(load)
        self.follow(load.version, load.source)

    def seconds_left(self, load: ObjectLoad) -> float | None:
        """How long it will take, at the pace of the last second, until this load is complete: infinity if it is not
        being fetched, None if not known yet."""
        with self._lock:
            now = time.monotonic()
            if load not in self._board.active or load.stays_partial():
                return math.inf
            if load.is_listened_to() and self._pace.is_below(_SLOW, now):
                return math.inf
            pace = self._pace.per_second(now)
            return self._board.before(load) / pace if pace else None

    def pause(self) -> None:
        """No more flights that nobody waits for."""
        with self._lock:
            self._board.pause()

    def follow(self, version: ObjectVersion, source: str) -> None:
        """A file is being read: fetch what comes along, and what its reader will want next, if it is a shard, or the
        config of a model."""
        if not self._settings.prefetch:
            return
        if self._along.due(version):
            self.task(lambda: self._along.fetch(version, source))
        if not self.learning.follow(version, source):
            self._ahead.follow(version, source)

    def progress(self) -> dict[str, int]:
        """What is going on, for `fusecache status`."""
        with self._lock:
            return {
                "loads": len(self._loads),
                "waiting_reads": len(self._waiters),
                **self._board.progress(),
            }

    # -- the crew

    def take(self, demand_only: bool, remote: bool) -> Job | Callable[[], None] | None:
        """See crew.Employer."""
        job = self._board.take(demand_only, time.monotonic(), remote)
        if job is not None and self._board.urgent(remote):
            self._crew.more(remote)
        if remote and isinstance(job, Job) and job.load.route is not None and job.load.route.in_order:
            self._crew.any.notify()  # it may be the turn of a stripe of our own
        return job

    def do(self, job: Job | Callable[[], None]) -> None:
        """See crew.Employer."""
        if isinstance(job, Job):
            self._fly(job)
        else:
            job()

    def _fly(self, job: Job) -> None:
        load, started = job.load, time.monotonic()
        if not job.verify:
            with self._lock:
                self.stats.flights += 1
        left, error = flight.fly(
            job,
            self._supplier,
            self,
            deadline=started + self._settings.deadline,
            cancelled=lambda: self._stopping or load.gone is not None,
        )
        self._landed(job, started, left, error)

    def _landed(self, job: Job, started: float, left: Iterable[int], error: FusecacheError | None) -> None:
        load = job.load
        failed: list[Waiter] = []
        gone = False
        with self._lock:
            self._board.ended(job)
            if error is None:
                load.failures = 0
                self._call_for(load, load.give_back(left))
                if load.read and load.opens and load.stored.present(job.blocks[0]) and load.has_idle():
                    self._want_all(load)  # it was set aside for want of space, or after failures
            else:
                self.stats.flights_failed += 1
                self._board.look_again(load)
                failed, gone = self._failed(job, started, error)
            if load.stored.complete or (gone and self._board.holds(load)):
                self._board.retire(load)
            closing = self._closable(load)
            complete = load.stored.ready
        settle(failed, error)
        if complete:
            self._library.completed(load.version)
        if gone:
            self._library.gone(load.version)
        if closing:
            load.stored.close()

    def _failed(self, job: Job, started: float, error: FusecacheError) -> tuple[list[Waiter], bool]:
        """Under the lock: who has to be told, and whether this version is gone."""
        load = job.load
        unlanded = [block for block in job.blocks if not load.stored.present(block)]
        wanted = load.give_back(block for block in unlanded if not self._board.is_put_off(load, block))
        if isinstance(error, VersionChangedError):
            gone = load.gone is None
            load.gone = error
            victims = {waiter for waiters in load.waiting.values() for waiter in waiters}
            victims.update(load.behind_seal)
            for waiter in victims:
                self._forget(waiter)
            return list(victims), gone
        if isinstance(error, StoreError | CancelledReadError):
            # the store is passed over from now on (its health says so): fly again for those who wait
            self._call_for(load, wanted)
            return [], False
        load.failures += 1
        load.resting_until = time.monotonic() + _REST * min(load.failures, 12)
        if load.failures in (1, 10) or load.failures % 100 == 0:
            _log.warning("%s: %s", load.version.key, error)
        if load.failures >= _GIVE_UP and not load.opens and self._board.holds(load):
            self._board.retire(load)
        self._board.put_off(load.resting_until, load, range(0))
        self._wake_clock.notify()
        denied = not isinstance(error, OriginError) or isinstance(error, AccessDeniedError)
        victims = {
            waiter
            for block in wanted
            for waiter in load.waiting.get(block, ())
            if denied or waiter.since <= started + 1.0
        }
        victims.update(w for w in load.behind_seal if denied or w.since <= started + 1.0)
        for waiter in victims:
            self._forget(waiter)
        self._call_for(load, [block for block in wanted if block in load.waiting])
        return list(victims), False

    # -- what flights tell

    def land(self, load: ObjectLoad, block: int, piece: bytes | None) -> None:
        """See flight.Tower."""
        with self._lock:
            length = load.bytes_of((block,))
            self.gate.moved = time.monotonic()
            self._pace.add(self.gate.moved, length)
            if piece is not None:
                self.stats.bytes_uncached += length
            waiters = load.land(block, piece)
            self._waiters.difference_update(waiters)
            look = self.gate.shall_look(load)
        settle(waiters, None)
        self.gate.look(load, look)

    def put_off(self, load: ObjectLoad, blocks: range) -> None:
        """See flight.Tower."""
        with self._lock:
            due = time.monotonic() + _LOOK_AGAIN
            self._board.put_off(due, load, blocks)
            self._wake_clock.notify()

    def wanted(self, load: ObjectLoad, blocks: range) -> range:
        """See flight.Tower."""
        with self._lock:
            stop = max((block + 1 for block in blocks if block in load.waiting), default=blocks.start)
            if stop == blocks.start and load.keeps(blocks.start) and self._board.holds(load):
                self._board.retire(load)  # no space, and nobody waits: what is read later is asked for then
        self.gate.no_room(load)
        return range(blocks.start, stop)

    # -- under the lock

    def _call_for(self, load: ObjectLoad, blocks: Iterable[int], *, head: bool = False) -> None:
        if self._board.call_for(load, blocks, head=head):
            self._crew.call()

    def _want_all(self, load: ObjectLoad) -> None:
        if self._settings.prefetch:
            self.learning.first_read(load)
            if self._board.activate(load):
                self._crew.call_all()

    def _forget(self, waiter: Waiter) -> None:
        self._waiters.discard(waiter)
        waiter.load.drop(waiter)

    def loaded(self, object_id: ObjectId) -> ObjectLoad | None:
        """See Office."""
        return self._loads.get(object_id)

    def wake(self) -> None:
        """See Office."""
        self._crew.call_all()
        self._wake_clock.notify()

    def task(self, work: Callable[[], None]) -> None:
        """See Office."""
        with self._lock:
            self._board.tasks.append(work)
            self._crew.any.notify()

    def inspect(self, load: ObjectLoad) -> None:
        """See Office."""
        with self._lock:
            look = self.gate.shall_look(load)
        self.gate.look(load, look)

    def let_go(self, load: ObjectLoad) -> None:
        """See Office."""
        with self._lock:
            closing = self._closable(load)
        if closing:
            load.stored.close()

    def _clock(self) -> None:
        """Expire waiters, and look again at what was put off."""
        while True:
            with self._lock:
                if self._stopping:
                    return
                now = time.monotonic()
                for load, blocks in self._board.due(now):
                    self._call_for(load, load.give_back(blocks))
                    self._crew.any.notify()
                    self._crew.remote.notify()
                if self._board.tasks:
                    self._crew.any.notify()
                expired = [waiter for waiter in self._waiters if self.gate.is_late(waiter, now)]
                for waiter in expired:
                    self._forget(waiter)
                if not expired:
                    pause = 0.5 if self._waiters else None
                    due = self._board.next_due
                    if due is not None:
                        pause = max(0.001, min(due - now, pause or due - now))
                    self._wake_clock.wait(pause)
                    continue
            for waiter in expired:
                text = f"{waiter.load.version.key}: not within the deadline of {self._settings.deadline:g} s"
                settle([waiter], UnavailableError(text))
