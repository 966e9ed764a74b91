"""Open files: which nodeid is served how, and the passthrough backings of the kernel.

A file has two nodeids (see nodeids.py). The base is served by the daemon, from the store or through the loader;
the twin is opened with passthrough, when all of the file is in the store and verified. Which of them a path leads
to is decided at LOOKUP. When the decision is out of date at OPEN, the answer is ESTALE, on which the VFS looks the
path up again, once, and opens what it finds: so a file that became complete is served by passthrough from its
next open on, without waiting for old handles, and without a notification.

ESTALE must not come twice for one open(2). So the backing of the twin is prepared before the base is bounced; and an
open that comes back to a base all the same (through /proc/self/fd, say, or when the version was replaced or evicted) is
served as it is. Who comes back is known by the thread, which is in its open(2) until then (bounces.py): other ranks
that open the same file at that moment are sent to the twin, too.

A twin is opened by the channel's thread that read the OPEN (`open_whole`): through pyfuse3, the event loop and a worker
it took 1 to 5 ms, and `torch.load(mmap=True)` opens every file twice. What the loader makes of it is left to the
`chores` thread, and that is woken after the reply: until then the two would compete for the GIL.

Ownership: `_lock` guards the table; it is never held across I/O, so that the event loop may take it. `_opening`
lets one thread at a time do the I/O of opening. Closing is left to the `chores` thread. Lock order: `_opening`,
`_lock`. The channel's threads read the table without a lock (single dict operations). An open joins what is in the
table under `_lock` (`_join`): the last release may take it out at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from fusecache.attest.inspector import Inspector
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import Entry
from fusecache.errors import FusecacheError, StoreError, VersionChangedError
from fusecache.loader.load import ObjectLoad
from fusecache.loader.loader import Loader
from fusecache.loader.plan import is_shard
from fusecache.loader.waiters import Waiter
from fusecache.mount.backings import Backings, Passthrough
from fusecache.mount.bounces import BOUNCE, Bounces
from fusecache.mount.journal import Journal, OpenRecord
from fusecache.mount.nodeids import inode_number, is_passthrough, passthrough_twin
from fusecache.mount.opens import OpenFile, OpenStats
from fusecache.mount.patience import Patience
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

_LOOK = 0.05
"""Seconds between looks at the pace of a fetch that an open waits for."""


class Handles:
    """The open files of one mount. `start` and `close` own the chores thread."""

    def __init__(
        self,
        catalog: Catalog,
        loader: Loader,
        store: BlockStore,
        journal: Journal,
        *,
        backings: Backings,
        passthrough: Passthrough,
        open_wait: float = 0.0,
        set_read_ahead: Callable[[bool], None] | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        self._set_read_ahead = set_read_ahead
        """Told, before an open is answered, whether the kernel is to read little ahead of its reader."""
        self.traced = False
        """Somebody traces: new opens are served by the daemon, which sees their reads."""
        self._inspector = inspector
        self._at_gate: Counter[int] = Counter()
        """Base nodeid -> opens that wait until somebody vouches for the file. Of the event loop."""
        self._open_wait = open_wait
        self._whole: dict[ObjectId, trio.Event] = {}
        """Set when a version that an open waits for is complete."""
        self._token: trio.lowlevel.TrioToken | None = None
        self.passthrough = passthrough
        self.stats = OpenStats()
        self._catalog = catalog
        self._loader = loader
        self._store = store
        self._journal = journal
        self._backings = backings
        self._files: dict[int, OpenFile] = {}
        self._inherited: dict[int, OpenRecord] = dict(journal.inherited)
        """Open in the kernel since before this daemon started, and not taken up yet."""
        self._complete: dict[ObjectId, None] = {}
        """Versions known to be whole and verified, so that LOOKUP leads to the twin. A hint: OPEN looks itself."""
        self._refused: set[ObjectId] = set()
        """Versions whose data file the kernel did not take for passthrough."""
        self._bounces = Bounces()
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._chores: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._do_chores, name="chores", daemon=True)
        self._limiter = trio.CapacityLimiter(4)

    # -- life

    def start(self) -> None:
        """Start the chores thread; from within trio.run()."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """End the chores and close what is open here; the kernel's handles go on by themselves."""
        self._chores.put(None)
        self._thread.join(timeout)
        with self._lock:
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            self._let_go(file)

    def later(self, chore: Callable[[], None]) -> None:
        """Have something done that may block, off the event loop and outside of all requests."""
        self._chores.put(chore)

    def _do_chores(self) -> None:
        while True:
            try:
                chore = self._chores.get(timeout=BOUNCE if self._ready() else None)
            except queue.Empty:
                chore = self._tidy
            if chore is None:
                return
            try:
                chore()
            except Exception:
                _log.exception("a chore failed in an unforeseen way")

    def _ready(self) -> bool:
        """Whether a twin is ready that nobody opened yet: it keeps its object from being evicted."""
        with self._lock:
            return any(file.count == 0 for file in self._files.values())

    def _tidy(self) -> None:
        with self._opening:
            self._prune()

    @property
    def _may_pass(self) -> bool:
        """Whether an open that comes now may be one with passthrough."""
        return self.passthrough.active and not self.traced

    def open_now(self) -> tuple[int, int]:
        """Nodeids that are open: with passthrough, and through the daemon."""
        with self._lock:
            nodeids = [file.nodeid for file in self._files.values() if file.count]
            nodeids += [nodeid for nodeid in self._inherited if nodeid not in self._files]
        passed = sum(map(is_passthrough, nodeids))
        return passed, len(nodeids) - passed

    # -- what the operations ask

    def use_passthrough(self, entry: Entry) -> bool:
        """Whether LOOKUP leads to the twin."""
        version = entry.version
        if version is None or not self._may_pass or version.id not in self._complete:
            return False
        return version.id not in self._refused

    async def open(self, nodeid: int, flags: int, thread: int) -> None:
        """Open a file, either twin, for this thread. Raises VersionChangedError when the other twin is the right one
        now, or the version is gone, and StoreError when not even an empty place in the cache can be had."""
        entry = self._catalog.get(inode_number(nodeid))
        path = entry.path if entry is not None else None
        second = self._bounces.comes_again(path, thread)
        load = None
        try:
            if entry is not None and self._inspector is not None:
                if not is_passthrough(nodeid) or nodeid not in self._files:
                    load = await self._pass_gate(entry, self._inspector)
            elif entry is not None and not second and not is_passthrough(nodeid):
                load = await self._wait_until_whole(entry)
            await trio.to_thread.run_sync(self._open, nodeid, not second, limiter=self._limiter)
        except VersionChangedError:
            self.sent_back(path, thread)
            raise
        finally:
            if load is not None:
                self.later(functools.partial(self._loader.release, load))

    def sent_back(self, path: str | None, thread: int) -> None:
        """See operations.Handles."""
        self._bounces.add(path, thread)

    async def _pass_gate(self, entry: Entry, inspector: Inspector) -> ObjectLoad | None:
        """Have a sealed file fetched, and held against its manifest. Raises AttestationError when it is not what that
        says, UnavailableError when nothing came for the deadline. Returns the load as `_wait_until_whole` does."""
        version, source = entry.version, entry.source
        if version is None:
            return None
        try:
            load = await trio.to_thread.run_sync(inspector.admit, version, source, limiter=self._limiter)
        except VersionChangedError:
            self._catalog.changed(entry)
            raise
        token, settled = trio.lowlevel.current_trio_token(), trio.Event()

        def tell(_waiter: Waiter) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(settled.set)

        self._at_gate[entry.nodeid] += 1
        waiter = None
        try:
            waiter = self._loader.await_seal(load, tell)
            if waiter is not None:
                await settled.wait()
                if waiter.error is not None:
                    raise waiter.error
        except BaseException:
            if waiter is not None:
                self._loader.cancel(waiter)
            self.later(functools.partial(self._loader.release, load))
            raise
        finally:
            self._at_gate -= Counter((entry.nodeid,))
        return load

    def at_gate(self, nodeid: int) -> bool:
        """See channel.OpenFiles."""
        return self._at_gate[inode_number(nodeid)] > 0

    async def _wait_until_whole(self, entry: Entry) -> ObjectLoad | None:
        """Have a file of weights fetched before it is opened, if that takes no longer than `open_wait`.

        Read through passthrough, its bytes are copied once; through the daemon, while they arrive, three times
        (socket, store, FUSE page cache) and a round trip per MiB: on a machine whose CPUs are the limit a cold
        load took 1.5 to 1.9 times as long as the download alone that way.

        Returns the load, opened once more, if there is one: what it verified is known as long as it is open.
        """
        version, source = entry.version, entry.source
        if not (self._open_wait and self._may_pass and version and version.size and is_shard(version.key)):
            return None
        if version.id in self._complete or entry.nodeid in self._files:
            return None
        load = await trio.to_thread.run_sync(self._loader.open, version, source, limiter=self._limiter)
        whole = self._whole.setdefault(version.id, trio.Event())
        try:
            self._loader.hurry(load)
            patience = Patience(self._open_wait, trio.current_time())
            while not load.stored.complete:
                if patience.ends(trio.current_time(), self._loader.seconds_left(load)):
                    break
                with trio.move_on_after(_LOOK):
                    await whole.wait()
        except BaseException:
            self.later(functools.partial(self._loader.release, load))
            raise
        finally:
            self._whole.pop(version.id, None)
        return load

    def release(self, nodeid: int) -> None:
        """One open less. Does not block."""
        with self._lock:
            file = self._files.get(nodeid)
            if file is None:
                record = self._inherited.get(nodeid)
                if record is not None:
                    record.count -= 1
                    if record.count <= 0:
                        del self._inherited[nodeid]
                        if record.backing:
                            self._chores.put(functools.partial(self._backings.close, record.backing))
                self._chores.put(lambda: self._journal.released(nodeid))
                return
            file.count -= 1
            last = file.count <= 0
            if last:
                del self._files[nodeid]
        self._chores.put(lambda: self._journal.released(nodeid))
        if last:
            self._chores.put(lambda: self._left(file))

    async def read(self, nodeid: int, offset: int, size: int) -> Buffer:
        """Bytes for a READ that came through pyfuse3 after all."""

        def work() -> bytes:
            load = self.reading(nodeid)
            length = max(0, min(size, load.version.size - offset))
            return self._loader.read(load, offset, length) if length else b""

        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    def cached_bytes(self, entry: Entry) -> int:
        """Bytes of this file in the store, as far as this process knows without looking at the disk."""
        if entry.version is None:
            return 0
        for nodeid in (entry.nodeid, passthrough_twin(entry.nodeid)):
            file = self._files.get(nodeid)
            if file is not None:
                stored = file.stored or (file.load.stored if file.load else None)
                if stored is not None:
                    return stored.cached_bytes()
        stored = self._store.open(entry.version)
        try:
            return stored.cached_bytes()
        finally:
            stored.close()

    def usage(self) -> tuple[int, int]:
        """Bytes used, and the limit, of the cache."""
        usage = self._store.usage()
        return usage.used, usage.limit

    # -- what the channel asks

    def reading(self, nodeid: int) -> ObjectLoad:
        """See channel.OpenFiles. Takes up files that were opened through an earlier daemon."""
        file = self._files.get(nodeid)
        if file is not None and file.load is not None:
            return file.load
        with self._opening:
            file = self._files.get(nodeid)
            if file is None:
                file = self._take_up(nodeid)
            if file.load is None:
                file.load = self._loader.open(file.version, file.source)
            return file.load

    def open_whole(self, nodeid: int) -> int:
        """See channel.OpenFiles."""
        if not self._catalog.is_current(inode_number(nodeid)):
            return 0
        file = self._join(nodeid, ready=True)
        if file is None:
            if nodeid in self._inherited or nodeid in self._files or self._inspector is not None:
                return 0
            try:
                with self._opening:
                    file = self._opened_twin(nodeid)
            except FusecacheError:
                return 0  # it is opened once more, by who has the words for what is wrong
        self._journal.opened(file.nodeid, file.version, file.source, file.backing)
        return file.backing

    def opened(self, nodeid: int) -> None:
        """See channel.OpenFiles."""
        file = self._files.get(nodeid)
        if file is not None and not file.followed:
            self.later(functools.partial(self._follow, file))

    def backing_id(self, nodeid: int) -> int:
        """See channel.OpenFiles."""
        file = self._files.get(nodeid)
        return file.backing if file is not None else 0

    def completed(self, version: ObjectVersion) -> None:
        """The loader has all of this version."""
        self._complete[version.id] = None
        whole = self._whole.get(version.id)
        if whole is not None and self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(whole.set)

    # -- opening, in a thread

    def _open(self, nodeid: int, bounce: bool) -> None:
        with self._opening:
            self._prune()
            if is_passthrough(nodeid):
                self._open_twin(nodeid)
            else:
                self._open_base(nodeid, bounce)

    def _open_base(self, nodeid: int, bounce: bool) -> None:
        file = self._files.get(nodeid)
        if file is None and nodeid in self._inherited:
            file = self._take_up(nodeid)
        if file is None:
            version, source = self._find(nodeid)
            load = self._loader.open(version, source)
            file = OpenFile(nodeid, version, source, load, None)
        load = file.load or self._loader.open(file.version, file.source)
        file.load = load
        fresh = file.count == 0 and nodeid not in self._files
        try:
            if load.gone is not None and not load.stored.ready:
                raise load.gone
            if bounce and self._bounce(file):
                self.stats.bounced += 1
                raise VersionChangedError(f"{file.version.key} is complete now: look it up again")
        except FusecacheError:
            if fresh:
                self._loader.release(load)
            raise
        if self._set_read_ahead is not None:
            self._set_read_ahead(load.is_listened_to())
        self._count(file)

    def _bounce(self, file: OpenFile) -> bool:
        """Whether this open of a base is to be repeated on the twin, which is ready for it then."""
        assert file.load is not None
        if not (self._may_pass and file.load.stored.ready and file.version.size):
            return False
        if file.version.id in self._refused:
            return False
        twin = passthrough_twin(file.nodeid)
        if twin not in self._files and not self._prepare(twin, file.version, file.source):
            return False
        self._complete[file.version.id] = None
        self._chores.put(self._tidy)  # has the thread look at the time from now on
        return True

    def _open_twin(self, nodeid: int) -> None:
        if nodeid in self._inherited and nodeid not in self._files:
            self._take_up(nodeid)
        file = self._opened_twin(nodeid)
        self._journal.opened(file.nodeid, file.version, file.source, file.backing)
        self.opened(nodeid)

    def _opened_twin(self, nodeid: int) -> OpenFile:
        """A twin, made ready if need be, and opened once more. Raises VersionChangedError."""
        while (file := self._join(nodeid)) is None:
            version, source = self._find(nodeid)
            if version.id in self._refused or self._prepare(nodeid, version, source) is None:
                self._complete.pop(version.id, None)
                raise VersionChangedError(f"{version.key} is not complete any more: look it up again")
        return file

    def _join(self, nodeid: int, *, ready: bool = False) -> OpenFile | None:
        """One more open of a twin that is in the table; None: it is not. `ready`: only of one that has its backing."""
        with self._lock:
            file = self._files.get(nodeid)
            if file is None or (ready and not file.backing):
                return None
            file.count += 1
            self.stats.passthrough += 1
        return file

    def _prepare(self, nodeid: int, version: ObjectVersion, source: str) -> OpenFile | None:
        """A twin with its backing, in the table with no opens; None: it can't be had."""
        try:
            stored = self._store.open(version)
        except StoreError:
            return None
        try:
            if not stored.ready or stored.retired:
                stored.close()
                return None
            stored.touch()
            backing = self._backings.open(stored.fileno())
        except OSError as error:
            stored.close()
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTTY):
                self.passthrough.refuse(f"the kernel refused it: {error.strerror}")
            else:
                _log.warning("%s: no passthrough for this file: %s", version.key, error.strerror)
            self._refused.add(version.id)
            return None
        except StoreError:
            stored.close()
            return None
        file = OpenFile(nodeid, version, source, None, stored, backing, since=time.monotonic())
        with self._lock:
            self._files[nodeid] = file
        return file

    def _count(self, file: OpenFile) -> None:
        """One more open of a base."""
        with self._lock:
            file.count += 1
            first = file.count == 1
            self._files[file.nodeid] = file
            self.stats.daemon += 1
        if first:
            file.entered = self._loader.learning.entered(file.version, whole=False)
        self._journal.opened(file.nodeid, file.version, file.source, file.backing)

    def _find(self, nodeid: int) -> tuple[ObjectVersion, str]:
        entry = self._catalog.get(inode_number(nodeid))
        if entry is None or entry.version is None:
            raise VersionChangedError("the file changed at the origin: look it up again")
        return entry.version, entry.source

    def _take_up(self, nodeid: int) -> OpenFile:
        """A file that is open in the kernel since before this daemon started; `_opening` is held."""
        with self._lock:
            record = self._inherited.pop(nodeid, None)
        if record is None:
            version, source = self._find(nodeid)
            record = OpenRecord(version, source, 0, 1)
        stored = None
        if is_passthrough(nodeid):
            stored = self._store.open(record.version)
        file = OpenFile(nodeid, record.version, record.source, None, stored, record.backing, record.count)
        with self._lock:
            self._files[nodeid] = file
        return file

    def _prune(self) -> None:
        """Drop twins that were prepared and never opened."""
        now = time.monotonic()
        with self._lock:
            stale = [
                file
                for file in self._files.values()
                if file.count == 0 and is_passthrough(file.nodeid) and now - file.since > BOUNCE
            ]
            for file in stale:
                del self._files[file.nodeid]
        for file in stale:
            self._chores.put(lambda file=file: self._let_go(file))  # type: ignore[misc]

    # -- after opening and closing, in the chores thread

    def _follow(self, file: OpenFile) -> None:
        """The kernel reads this file now: see to what is read with it."""
        if file.followed:
            return
        file.followed = True
        file.entered = self._loader.learning.entered(file.version, whole=True)
        self._loader.follow(file.version, file.source)

    def _left(self, file: OpenFile) -> None:
        file.followed = True
        if file.entered:
            self._loader.learning.left(file.version)
        self._let_go(file)

    def _let_go(self, file: OpenFile) -> None:
        if file.backing:
            self._backings.close(file.backing)
        if file.stored is not None:
            file.stored.close()
        if file.load is not None:
            self._loader.release(file.load)
