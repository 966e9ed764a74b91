"""The daemon's half of `fusecache trace`: begins a trace, streams its events, and ends it.

While a trace runs, new opens are served by the daemon, which sees their reads, and the kernel keeps no names
nor, over an open, pages; the names that it knew before expire when the trace begins. All of that ends with the
stream: when the client says so, goes away, or takes nothing for too long. There is one trace at a time: it changes how
the mount serves, and what two ask for may differ.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import trio

from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import ROOT
from fusecache.config.model import MountConfig
from fusecache.errors import ConfigError, MountError
from fusecache.mount import mounting
from fusecache.mount.channel import Channel
from fusecache.mount.handles import Handles
from fusecache.mount.trace import Tracer

_log = logging.getLogger(__name__)

_BATCH = 4096
"""Events in one message: some 700 KiB."""
_PAUSE = 0.1
"""Seconds between two looks for events."""
_HEARTBEAT = 0.2
"""Seconds after which a message goes out, empty if need be: the client looks then whether its command has ended."""
_SETTLE = 0.2
"""Seconds after the client asked for the end in which what it did last comes in: RELEASE is sent after close(2)."""
_EXPIRE = 5.0
"""Most seconds for telling the kernel which names to look up again: a million at least."""


class Tracing:
    """The traces of one mount. `absent` are the lookups that found nothing lately (see Operations)."""

    def __init__(
        self,
        config: MountConfig,
        catalog: Catalog,
        handles: Handles,
        channel: Channel,
        absent: Sequence[tuple[int, bytes]],
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._handles = handles
        self._channel = channel
        self._absent = absent
        self.running = False
        """Whether somebody traces, or what that changed is just being undone."""

    async def start(self, request: dict[str, Any]) -> TraceStream:
        """The events from now on. "exact": no read-ahead; "writes": the kernel hands on what it would refuse itself.
        Raises ConfigError when a trace is running already, and MountError for what this mount can't do."""
        if self.running:
            raise ConfigError("a trace of this mount is running already: end that one first")
        device = mounting.device_of(self._config.mountpoint)
        if device is None:
            raise MountError(f"{self._config.mountpoint} is not mounted")
        self.running = True
        tracer = Tracer(self._describe, device)
        stream = TraceStream(
            self, tracer, exact=bool(request.get("exact")), writes=bool(request.get("writes"))
        )
        try:
            await self._begin(stream)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.close()
            raise
        return stream

    def _describe(self, inode: int) -> tuple[str, int] | None:
        entry = self._catalog.get(inode)
        return None if entry is None else (entry.path, entry.size)

    async def _begin(self, stream: TraceStream) -> None:
        await trio.to_thread.run_sync(self._change, stream)
        stream.opened_before = self._handles.open_now()
        self._handles.traced = True
        self._channel.tracer = stream.tracer
        stream.tracer.start()
        names = list(self._absent)
        names += [(entry.parent, entry.name) for entry in self._catalog.retained() if entry.nodeid != ROOT]
        names = list(dict.fromkeys(names))
        stream.hidden = len(names)
        if self._channel.can_expire:
            until = time.monotonic() + _EXPIRE
            expire = partial(self._channel.expire_entries, names, until)
            stream.hidden = await trio.to_thread.run_sync(expire, abandon_on_cancel=True)

    def end(self, stream: TraceStream) -> None:
        """Serve as before. May block on the kernel."""
        self._channel.tracer = None
        self._handles.traced = False
        stream.tracer.stop()
        mountpoint = self._config.mountpoint
        try:
            if stream.writes and mounting.is_writable(mountpoint):
                mounting.remount(mountpoint, writable=False)
            if stream.exact:
                mounting.set_read_ahead(mountpoint, self._config.read_ahead)
        except (OSError, MountError) as error:  # it is being unmounted, most likely
            _log.warning("after a trace: %s", error)

    def ended(self) -> None:
        """Another trace may begin."""
        self.running = False

    def _change(self, stream: TraceStream) -> None:
        mountpoint = self._config.mountpoint
        try:
            if stream.exact:
                mounting.set_read_ahead(mountpoint, 0)
            if stream.writes:
                mounting.remount(mountpoint, writable=True)
        except OSError as error:
            wanted = "--writes" if stream.writes else "--exact"
            raise MountError(f"{wanted}: {error.strerror}: only for a mount that root made") from error


class TraceStream:
    """See control.Stream. The first item says what can't be seen, the others are lists of events."""

    def __init__(self, tracing: Tracing, tracer: Tracer, *, exact: bool, writes: bool) -> None:
        self.tracer = tracer
        self.exact = exact
        self.writes = writes
        self.opened_before = (0, 0)
        self.hidden = 0
        """Names that the kernel may answer for by itself for some time."""
        self._tracing = tracing
        self._told = False
        self._closed = False

    async def next(self, stop: trio.Event) -> object | None:
        """See control.Stream."""
        if not self._told:
            self._told = True
            passed, served = self.opened_before
            return {"open_passthrough": passed, "open_daemon": served, "hidden": self.hidden}
        waited = 0.0
        while not (events := self.tracer.take(_BATCH)) and not stop.is_set() and waited < _HEARTBEAT:
            waited += _PAUSE
            with trio.move_on_after(_PAUSE):
                await stop.wait()
        if events or not stop.is_set():
            return events
        await trio.sleep(_SETTLE)
        return self.tracer.take(_BATCH) or None

    def result(self) -> object:
        """See control.Stream."""
        return {"lost": self.tracer.lost}

    async def close(self) -> None:
        """See control.Stream."""
        if not self._closed:
            self._closed = True
            try:
                await trio.to_thread.run_sync(self._tracing.end, self)
            finally:
                self._tracing.ended()
