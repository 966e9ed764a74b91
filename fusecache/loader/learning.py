"""The order in which a model is read: taken down at its first load, followed at the next ones.

Theory of operation. The first open or read of a shard begins a *session* of its model. A task of the crew has the
headers fetched, asks other nodes for a recording if the cache directory has none, and follows what it found. While a
session lasts the READs of its files are taken down (recorder.py); when nobody reads any more, that becomes the
recording, if there was none, or if the one that was followed was wrong. A load of a model that is whole in the store
has no session: there is nothing to fetch and nothing to hear (`_is_here`).

A recording that leaves blocks out makes files *sparse* (`ObjectLoad.wanted`): only what it names is fetched ahead, and
what somebody asks for. Readers who stray from it end that, and all goes on as if there were none (`asked`). The rest
of sparse files is fetched when all is quiet (filling.py).

Ownership: the loader's lock guards everything in here. Interleavings worth knowing. (1) A load is opened while the
answer of other nodes is awaited: it is told when that is there (`_studied`), and until then, for a moment, it is
not fetched ahead (`first_read`). (2) A session ends while its task still puts the steps together: the task sees
that under the lock, and lets go of what it opened.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fusecache.errors import FusecacheError
from fusecache.loader.ahead import Ahead
from fusecache.loader.board import Board
from fusecache.loader.filling import Filling
from fusecache.loader.heads import fetch_heads
from fusecache.loader.interface import Library, LoaderSettings, Others, Shelf
from fusecache.loader.load import ObjectLoad
from fusecache.loader.models import Model, Session, worth_it
from fusecache.loader.office import Office
from fusecache.loader.plan import announces, beside, is_config, is_shard, model_of
from fusecache.loader.recorder import Recorder
from fusecache.loader.recording import RecordingError, pack, unpack
from fusecache.loader.replay import Replay
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_LOOK = 1.0
"""Seconds between looks at whether a load is over."""
_HELD = 0.3
"""Most seconds that a file is not fetched ahead because headers are queued, or other nodes asked for a recording."""
_HEADS_AGAIN = 60.0
_KNOWN = 20_000
_STRAYED = 8
"""One block for so many that are wanted, read though it is not, and the recording is wrong."""
_FEW = 4


@dataclass
class LearningStats:
    """Counters since the start: recordings made, loads that followed one, loads that strayed from it, recordings that
    came from other nodes."""

    recorded: int = 0
    replayed: int = 0
    wrong: int = 0
    from_nodes: int = 0


class Learning:
    """One per loader. Without `shelf`, or with learn off, nothing is taken down or followed, and only headers are seen
    to. Thread-safe; methods that are called with the loader's lock say so."""

    def __init__(
        self,
        office: Office,
        board: Board,
        library: Library,
        settings: LoaderSettings,
        ahead: Ahead,
        shelf: Shelf | None,
        others: Others | None,
    ) -> None:
        self.stats = LearningStats()
        self._office = office
        self._board = board
        self._library = library
        self._settings = settings
        self._ahead = ahead
        self._shelf = shelf if settings.learn else None
        self._others = others
        self.filling = Filling(office, board)
        self._models: dict[ObjectId, Model | None] = {}
        """By each of its files; None: nothing is learned of that one."""

    # -- which model a file is a part of

    def attach(self, load: ObjectLoad) -> None:
        """Tell a new load of a shard what it is a part of, and what is known of that. Does disk I/O."""
        if not self._settings.prefetch or not is_shard(load.version.key):
            return
        with self._office.lock:
            known = load.version.id in self._models
        if not known:
            self._find(load.version, load.source, load.stored.block_size)
        with self._office.lock:
            self._tell(load, self._models.get(load.version.id))

    def _tell(self, load: ObjectLoad, model: Model | None) -> None:
        load.model = model
        if model is not None:
            load.file = model.number(load.version.id)
            # all of a sealed file has to be there before anybody reads any of it
            load.wanted = None if load.stored.sealed else model.wanted(load.file)
            load.strayed = 0

    def _find(self, version: ObjectVersion, source: str, block_size: int) -> None:
        versions = self._shards(version)
        model = None
        if version in versions and worth_it(versions, block_size):
            learns = self._shelf is not None
            model = Model(source, versions, block_size, self._settings.read_ahead, learns)
            data = self._shelf.load(model.id) if self._shelf is not None else None
            if data is not None:
                self._take_over(model, data, "in the cache directory")
        with self._office.lock:
            while len(self._models) > _KNOWN:
                del self._models[next(iter(self._models))]
            if model is None:
                self._models[version.id] = None
                return
            for other in model.versions:
                self._models[other.id] = model
                load = self._office.loaded(other.id)
                if load is not None:
                    self._tell(load, model)

    def _shards(self, version: ObjectVersion) -> tuple[ObjectVersion, ...]:
        """Those that this file belongs to, or announces, in the order of their keys."""
        names = beside(version, self._library.siblings(version))
        return tuple(names[name] for name in model_of(version.key.rpartition("/")[2], list(names)))

    def _take_over(self, model: Model, data: bytes, whence: str) -> bool:
        """Whether these bytes are a recording of this model, which is followed from now on."""
        key = model.versions[0].key
        try:
            recording = unpack(data)
        except RecordingError as error:
            _log.warning("the recording of %s %s is passed over: %s", key, whence, error)
            return False
        with self._office.lock:
            fits = model.take(recording)
        if not fits:
            _log.warning("the recording of %s %s is passed over: it is one of other files", key, whence)
        return fits

    # -- what is opened, read and closed

    def first_read(self, load: ObjectLoad) -> None:
        """Somebody is going to read this file: it is not fetched ahead until its session's task has told what it found,
        or a moment has passed. With the lock."""
        if load.model is not None and not self._session(load.model).studied:
            load.resting_until = time.monotonic() + _HELD
            self._board.put_off(load.resting_until, load, range(0))

    def follow(self, version: ObjectVersion, source: str) -> bool:
        """A file is being read; returns whether nothing else has to say what is fetched then: a recording does, or all
        is here. May look at the disk."""
        if announces(version.key.rpartition("/")[2]):
            self._office.task(functools.partial(self._announced, version, source))
            return is_config(version.key)
        with self._office.lock:
            model = self._models.get(version.id)
        if model is None:
            return False
        if self._is_here(model):
            return True
        with self._office.lock:
            session = self._session(model)
            if not session.planned:
                session.planned = True
                self._board.tasks.append(functools.partial(self._study, model, session))
                self._office.wake()
            if self._others is not None and model.learning and not session.studied:
                session.behind = version, source  # until they have answered
                return True
            return model.recording is not None and not session.wrong

    def _announced(self, version: ObjectVersion, source: str) -> None:
        """An index or a config was read: have the headers of its shards fetched, and after a config, what a recording
        says, or all of them. In a thread of the crew."""
        config = is_config(version.key)
        shards = self._shards(version)
        if shards and all(self._office.store.has_whole(shard) for shard in shards):
            return
        if not shards or (config and self._ahead.announces_too_many(version)):
            if config:
                self._ahead.follow(version, source)
            return
        try:
            load = self._office.obtain(shards[0], source)
        except FusecacheError as error:
            _log.debug("no headers of %s: %s", shards[0].key, error)
            return
        if load.model is not None:
            self._heads(load.model)
        if config and not self.follow(shards[0], source):
            self._ahead.follow(version, source)
        self._office.release(load)

    def _is_here(self, model: Model) -> bool:
        """Whether all files of a model are whole in the store, and no load of it is going on. Without the lock."""
        now = time.monotonic()
        with self._office.lock:
            if model.session is not None:
                return False
            if now - model.here_at < _LOOK:
                return True
        if not all(self._office.store.has_whole(version) for version in model.versions):
            return False
        with self._office.lock:
            model.here_at = now
            return model.session is None

    def entered(self, version: ObjectVersion, *, whole: bool) -> bool:
        """Somebody opened a file; `whole`: the kernel answers its reads. If it returns True, pair it with `left`. May
        look at the disk."""
        with self._office.lock:
            model = self._models.get(version.id)
        if model is None or (whole and self._is_here(model)):
            return False
        with self._office.lock:
            session = self._session(model)
            session.readers += 1
            session.entered = True
            session.cold = session.cold or not whole
            recorder = session.recorder
        if recorder is not None:
            recorder.opened(model.number(version.id), whole=whole)
        return True

    def left(self, version: ObjectVersion) -> None:
        """The last who had a file open closed it. Takes microseconds."""
        with self._office.lock:
            model = self._models.get(version.id)
            if model is not None and model.session is not None:
                model.session.readers = max(0, model.session.readers - 1)
                model.session.last = time.monotonic()

    def asked(self, load: ObjectLoad, missing: Sequence[int]) -> None:
        """A reader asks for blocks, and these of them are not there. With the lock."""
        self._board.asked = time.monotonic()
        if load.wanted is None or not missing or load.model is None:
            return
        load.strayed += sum(load.strays(block) for block in missing)
        if load.strayed > max(_FEW, load.wanted.count(1) // _STRAYED):
            self._strayed(load.model, load)

    def _strayed(self, model: Model, by: ObjectLoad) -> None:
        """The recording does not fit the load: go on as if there were none."""
        self.stats.wrong += 1
        _log.info("%s: read otherwise than recorded: all of its model is fetched", by.version.key)
        session = self._session(model)
        session.wrong = True
        if session.replay is not None:
            with contextlib.suppress(ValueError):
                self._board.replays.remove(session.replay)
        for version in model.versions:
            load = self._office.loaded(version.id)
            if load is not None and load.wanted is not None:
                load.wanted = None
                if load.read:
                    self._board.activate(load)
        self._board.tasks.append(functools.partial(self._ahead.follow, by.version, by.source))
        self._office.wake()

    # -- a session, in tasks of the crew

    def _session(self, model: Model) -> Session:
        """The one that is going on, or a new one. With the lock."""
        now = time.monotonic()
        session = model.session
        if session is None:
            recorder = None
            if model.learns:
                recorder = Recorder(model.id, model.block_size, model.counts, model.ahead)
            session = model.session = Session(recorder, now)
            model.recorder = recorder
            self.filling.stop(model)
            self._board.remind(now + _LOOK, functools.partial(self._look, model))
            self._office.wake()
        session.last = now
        return session

    def _study(self, model: Model, session: Session) -> None:
        """At the beginning: headers, what others know, the recording."""
        if self._others is not None and model.learning and not session.asked_others:
            session.asked_others = True
            self._office.task(functools.partial(self._ask_others, model, session))
            self._heads(model)
            return
        self._heads(model)
        if model.recording is not None:
            self._replay(model, session)
        self._studied(model, session)

    def _heads(self, model: Model) -> None:
        now = time.monotonic()
        with self._office.lock:
            if now - model.heads_at < _HEADS_AGAIN:
                return
            model.heads_at = now
        fetch_heads(self._office, model)

    def _ask_others(self, model: Model, session: Session) -> None:
        assert self._others is not None
        data = self._others.find(model.id)
        if data is not None and self._take_over(model, data, "of another node"):
            self.stats.from_nodes += 1
            if self._shelf is not None:
                self._shelf.save(model.id, data)
            self._replay(model, session)
        self._studied(model, session)

    def _studied(self, model: Model, session: Session) -> None:
        """It is known what there is to know: go on with the loads that were begun meanwhile."""
        with self._office.lock:
            session.studied = True
            behind, session.behind = session.behind, None
            for number, version in enumerate(model.versions):
                load = self._office.loaded(version.id)
                if load is None:
                    continue
                if not load.failures:
                    load.resting_until = 0.0
                if load.wanted is None:
                    load.wanted = None if load.stored.sealed else model.wanted(number)
                    if load.wanted is not None:
                        self._board.retire(load)
            self._office.wake()
        if behind is not None and model.recording is None:
            self._ahead.follow(*behind)

    def _replay(self, model: Model, session: Session) -> None:
        """Follow the recording, as far as the budget reaches."""
        recording = model.recording
        assert recording is not None
        loads: dict[int, ObjectLoad] = {}
        for number in recording.files():
            try:
                loads[number] = self._office.obtain(model.versions[number], model.source)
            except FusecacheError as error:
                _log.warning("%s is not fetched ahead: %s", model.versions[number].key, error)
        steps, budget = [], self._settings.budget
        for run in recording.runs:
            budget -= (run.stop - run.start) * model.block_size
            if budget < 0:
                break
            if run.file in loads:
                steps.append((loads[run.file], range(run.start, run.stop)))
        # nodes that start together would ask one owner for the same stripe: there, all of it comes in each node's order
        shared = model.marks is None and any(load.route is not None for load in loads.values())
        replay = Replay([] if shared else steps)
        with self._office.lock:
            cold = any(load.idle.find(1, run.start, run.stop) >= 0 for load, run in steps)
            if cold:
                self.stats.replayed += 1
            followed = session is model.session and not session.wrong and not self._board.paused
            if followed:
                session.replay = replay
                self._board.replays.append(replay)
                self._office.wake()
        if cold:
            _log.info(
                "%s: following the recording of an earlier load: %d of %d blocks in %d files",
                model.versions[0].key,
                recording.blocks,
                sum(model.counts),
                len(loads),
            )
        if shared and followed:
            self._ahead.want(
                [(load.version, load.source) for load in dict.fromkeys(load for load, _ in steps)]
            )
        for load in loads.values():
            if not followed or load not in replay.loads:
                self._office.release(load)

    def _look(self, model: Model) -> None:
        """Whether the load is over."""
        now = time.monotonic()
        with self._office.lock:
            session = model.session
            if session is None:
                return
            loads = [self._office.loaded(version.id) for version in model.versions]
            waited_for = any(load is not None and load.waiting for load in loads)
            session.last = now if waited_for else max(session.last, model.heard)
            over = session.over(now)
            if over:
                model.session = model.recorder = None
            else:
                self._board.remind(now + _LOOK, functools.partial(self._look, model))
                self._office.wake()
            done = self._end_replay(session, over)
        for load in done:
            self._office.release(load)
        if over:
            self._end(model, session)

    def _end_replay(self, session: Session, over: bool) -> Sequence[ObjectLoad]:
        """The loads to release, if it was followed to its end, or nobody reads any more. With the lock."""
        replay = session.replay
        if replay is None or not (over or session.wrong or replay.done):
            return []
        session.replay = None
        with contextlib.suppress(ValueError):
            self._board.replays.remove(replay)
        return replay.loads

    def _end(self, model: Model, session: Session) -> None:
        self._keep(model, session)
        if not session.wrong and model.marks is not None:
            sparse = [number for number, mark in enumerate(model.marks) if 0 in mark]
            self.filling.add((model.versions[number], model.source) for number in sparse)
        model.layouts.clear()
        self._ahead.forget(version.id for version in model.versions)

    def _keep(self, model: Model, session: Session) -> None:
        """Make what was taken down the model's recording, if it needs one."""
        if (
            session.recorder is None
            or not session.cold
            or (model.recording is not None and not session.wrong)
        ):
            return
        recording = session.recorder.finish(model.layouts)
        if recording is None or self._shelf is None:
            return
        self._shelf.save(model.id, pack(recording))
        with self._office.lock:
            model.take(recording)
            self.stats.recorded += 1
        _log.info(
            "%s: recorded in which order it is read: %d of %d blocks, by %d processes",
            model.versions[0].key,
            recording.blocks,
            sum(model.counts),
            recording.ranks,
        )
        if self._others is not None:
            self._others.offer(model.id)

    def close(self) -> None:
        """Keep what was taken down of loads that are over: nobody has a file of theirs open. Does disk I/O."""
        with self._office.lock:
            models = {id(model): model for model in self._models.values() if model is not None}
            ended = [(model, model.session) for model in models.values() if model.session is not None]
            for model, _ in ended:
                model.session = model.recorder = None
        for model, session in ended:
            if not session.readers:
                self._keep(model, session)
