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
from fusecache_mount.device.channel import DeviceChannel
from fusecache_mount.fs.open_files import OpenFileTable
from fusecache_mount.lifecycle import fuse_mount, mounting
from fusecache_mount.tracing.tracer import AccessTracer

_log = logging.getLogger(__name__)

_BATCH_EVENTS = 4096
"""Events in one message: some 700 KiB."""
_POLL_SECONDS = 0.1
"""Seconds between two looks for events."""
_HEARTBEAT_SECONDS = 0.2
"""Seconds after which a message goes out, empty if need be: the client looks then whether its command has ended."""
_SETTLE_SECONDS = 0.2
"""Seconds after the client asked for the end in which what it did last comes in: RELEASE is sent after close(2)."""
_EXPIRE_SECONDS = 5.0
"""Most seconds for telling the kernel which names to look up again: a million at least."""


class TraceController:
    """The traces of one mount. `absent` are the lookups that found nothing lately (see Operations)."""

    def __init__(
        self,
        config: MountConfig,
        catalog: Catalog,
        open_files: OpenFileTable,
        channel: DeviceChannel,
        negative_lookups: Sequence[tuple[int, bytes]],
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._open_files = open_files
        self._channel = channel
        self._negative_lookups = negative_lookups
        self.is_running = False
        """Whether somebody traces, or what that changed is just being undone."""

    async def start_trace(self, request: dict[str, Any]) -> TraceStream:
        """The events from now on. "exact": no read-ahead; "writes": the kernel hands on what it would refuse itself.
        Raises ConfigError when a trace is running already, and MountError for what this mount can't do."""
        if self.is_running:
            raise ConfigError("a trace of this mount is running already: end that one first")
        device = fuse_mount.device_number_of(self._config.mountpoint)
        if device is None:
            raise MountError(f"{self._config.mountpoint} is not mounted")
        self.is_running = True
        tracer = AccessTracer(self._describe_inode, device)
        stream = TraceStream(
            self, tracer, is_exact=bool(request.get("exact")), passes_writes=bool(request.get("writes"))
        )
        try:
            await self._activate_trace(stream)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.close()
            raise
        return stream

    def _describe_inode(self, inode: int) -> tuple[str, int] | None:
        entry = self._catalog.entry_by_nodeid(inode)
        return None if entry is None else (entry.path, entry.size)

    async def _activate_trace(self, stream: TraceStream) -> None:
        await trio.to_thread.run_sync(self._change_mount, stream)
        stream.open_before_trace = self._open_files.count_open_nodeids()
        self._open_files.is_traced = True
        self._channel.tracer = stream.tracer
        stream.tracer.start()
        names = list(self._negative_lookups)
        names += [
            (entry.parent, entry.name) for entry in self._catalog.retained_entries() if entry.nodeid != ROOT
        ]
        names = list(dict.fromkeys(names))
        stream.hidden_name_count = len(names)
        if self._channel.supports_expire:
            until = time.monotonic() + _EXPIRE_SECONDS
            expire = partial(self._channel.expire_entries, names, until)
            stream.hidden_name_count = await trio.to_thread.run_sync(expire, abandon_on_cancel=True)

    def end_trace(self, stream: TraceStream) -> None:
        """Serve as before. May block on the kernel."""
        self._channel.tracer = None
        self._open_files.is_traced = False
        stream.tracer.stop()
        mountpoint = self._config.mountpoint
        try:
            if stream.passes_writes and fuse_mount.is_writable(mountpoint):
                mounting.set_writable(mountpoint, writable=False)
            if stream.is_exact:
                mounting.set_read_ahead(mountpoint, self._config.read_ahead)
        except (OSError, MountError) as error:  # it is being unmounted, most likely
            _log.warning("after a trace: %s", error)

    def allow_next_trace(self) -> None:
        """Another trace may begin."""
        self.is_running = False

    def _change_mount(self, stream: TraceStream) -> None:
        mountpoint = self._config.mountpoint
        try:
            if stream.is_exact:
                mounting.set_read_ahead(mountpoint, 0)
            if stream.passes_writes:
                mounting.set_writable(mountpoint, writable=True)
        except OSError as error:
            wanted = "--writes" if stream.passes_writes else "--exact"
            raise MountError(f"{wanted}: {error.strerror}: only for a mount that root made") from error


class TraceStream:
    """See control.Stream. The first item says what can't be seen, the others are lists of events."""

    def __init__(
        self, controller: TraceController, tracer: AccessTracer, *, is_exact: bool, passes_writes: bool
    ) -> None:
        self.tracer = tracer
        self.is_exact = is_exact
        self.passes_writes = passes_writes
        self.open_before_trace = (0, 0)
        self.hidden_name_count = 0
        """Names that the kernel may answer for by itself for some time."""
        self._controller = controller
        self._is_first_item_sent = False
        self._is_closed = False

    async def next_item(self, stop: trio.Event) -> object | None:
        """See control.Stream."""
        if not self._is_first_item_sent:
            self._is_first_item_sent = True
            passed, served = self.open_before_trace
            return {"open_passthrough": passed, "open_daemon": served, "hidden": self.hidden_name_count}
        waited = 0.0
        while (
            not (events := self.tracer.take_events(_BATCH_EVENTS))
            and not stop.is_set()
            and waited < _HEARTBEAT_SECONDS
        ):
            waited += _POLL_SECONDS
            with trio.move_on_after(_POLL_SECONDS):
                await stop.wait()
        if events or not stop.is_set():
            return events
        await trio.sleep(_SETTLE_SECONDS)
        return self.tracer.take_events(_BATCH_EVENTS) or None

    def result(self) -> object:
        """See control.Stream."""
        return {"lost": self.tracer.lost_events}

    async def close(self) -> None:
        """See control.Stream."""
        if not self._is_closed:
            self._is_closed = True
            try:
                await trio.to_thread.run_sync(self._controller.end_trace, self)
            finally:
                self._controller.allow_next_trace()
