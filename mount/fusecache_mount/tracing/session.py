"""The daemon's half of `fusecache trace`: begins a trace, streams its events, and ends it.

While a trace runs, new opens are served by the daemon, which sees their reads, and the kernel keeps no names
nor, over an open, pages; the names that it knew before expire when the trace begins. All of that ends with the
stream: when the client says so, goes away, or takes nothing for too long. There is one trace at a time: it changes how
the mount serves, and what two clients ask for may differ.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import trio

from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import ROOT
from fusecache.errors import ConfigError, MountError
from fusecache_mount.device.kernel_notifier import KernelNotifier
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.fs.mounted_files import MountedFiles
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


class TracedMount(Protocol):
    """The settings of a mount in the kernel that a trace changes. All but `device_number` may block on the daemon
    itself: they are never called in the event loop."""

    def device_number(self) -> str:
        """The "major:minor" of the mount. Raises MountError if it is not mounted."""

    def disable_read_ahead(self) -> None:
        """Have the kernel ask for what is read, and for nothing else. Raises OSError and MountError."""

    def restore_read_ahead(self) -> None:
        """Have the kernel read ahead as configured. Raises OSError and MountError."""

    def pass_writes(self) -> None:
        """Have the kernel pass changes to the daemon, which refuses them. Raises OSError."""

    def refuse_writes(self) -> None:
        """Have the kernel refuse changes itself. Raises OSError."""


@dataclass(frozen=True)
class TraceOptions:
    """The client's wishes: no read-ahead (`is_exact`), and the writes that the kernel would refuse itself."""

    is_exact: bool
    passes_writes: bool


@dataclass(frozen=True)
class BlindSpots:
    """Accesses that a trace can't see: by nodeids that were open before it, and of names that the kernel may answer
    for by itself for some time."""

    passthrough_opens: int
    daemon_opens: int
    hidden_names: int


class TraceController:
    """The traces of one mount, of the event loop. `negative_lookups` are (directory, name) of those that found nothing
    lately.

    | From | By | To |
    |---|---|---|
    | idle | `start_trace` | running |
    | running | the stream is closed, or `start_trace` fails | ending: what the trace changed is undone |
    | ending | the mount is as before | idle |

    `is_running` is true from `start_trace` until the mount is as before.
    """

    def __init__(
        self,
        mount: TracedMount,
        catalog: Catalog,
        open_files: MountedFiles,
        notifier: KernelNotifier,
        *,
        trace_switch: TraceSwitch,
        negative_lookups: Sequence[tuple[int, bytes]],
    ) -> None:
        self._mount = mount
        self._catalog = catalog
        self._open_files = open_files
        self._notifier = notifier
        self._trace_switch = trace_switch
        self._negative_lookups = negative_lookups
        self.is_running = False

    async def start_trace(self, request: dict[str, Any]) -> TraceStream:
        """The events from now on. "exact": no read-ahead; "writes": the kernel passes on what it would refuse itself.
        Raises ConfigError when a trace is running already, and MountError for what this mount can't do."""
        if self.is_running:
            raise ConfigError("a trace of this mount is running already: end that one first")
        options = TraceOptions(bool(request.get("exact")), bool(request.get("writes")))
        tracer = AccessTracer(self._describe_inode, self._mount.device_number())
        self.is_running = True
        try:
            blind_spots = await self._activate_trace(tracer, options)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._end_trace(tracer, options)
            raise
        return TraceStream(tracer, blind_spots, partial(self._end_trace, tracer, options))

    def _describe_inode(self, inode: int) -> tuple[str, int] | None:
        entry = self._catalog.nodes.entry_by_nodeid(inode)
        return None if entry is None else (entry.path, entry.size)

    async def _activate_trace(self, tracer: AccessTracer, options: TraceOptions) -> BlindSpots:
        await trio.to_thread.run_sync(self._change_mount, options)
        passthrough_opens, daemon_opens = self._open_files.count_open_nodeids()
        self._trace_switch.turn_on(tracer)
        tracer.start()
        names = list(self._negative_lookups)
        names += [
            (entry.parent, entry.name)
            for entry in self._catalog.nodes.retained_entries()
            if entry.nodeid != ROOT
        ]
        names = list(dict.fromkeys(names))
        hidden_names = len(names)
        if self._notifier.supports_expire:
            until = time.monotonic() + _EXPIRE_SECONDS
            expire = partial(self._notifier.expire_entries, names, until)
            hidden_names = await trio.to_thread.run_sync(expire, abandon_on_cancel=True)
        return BlindSpots(passthrough_opens, daemon_opens, hidden_names)

    def _change_mount(self, options: TraceOptions) -> None:
        try:
            if options.is_exact:
                self._mount.disable_read_ahead()
            if options.passes_writes:
                self._mount.pass_writes()
        except OSError as error:
            wanted = "--writes" if options.passes_writes else "--exact"
            raise MountError(f"{wanted}: {error.strerror}: only for a mount that root made") from error

    async def _end_trace(self, tracer: AccessTracer, options: TraceOptions) -> None:
        try:
            await trio.to_thread.run_sync(self._serve_as_before, tracer, options)
        finally:
            self.is_running = False

    def _serve_as_before(self, tracer: AccessTracer, options: TraceOptions) -> None:
        """Undo what the trace changed. May block on the kernel."""
        self._trace_switch.turn_off()
        tracer.stop()
        try:
            if options.passes_writes:
                self._mount.refuse_writes()
            if options.is_exact:
                self._mount.restore_read_ahead()
        except (OSError, MountError) as error:  # it is being unmounted, most likely
            _log.warning("after a trace: %s", error)


class TraceStream:
    """A control.Stream: its first item says what can't be seen, the others are lists of events. `on_close` ends the
    trace, once."""

    def __init__(
        self, tracer: AccessTracer, blind_spots: BlindSpots, on_close: Callable[[], Awaitable[None]]
    ) -> None:
        self._tracer = tracer
        self._blind_spots = blind_spots
        self._on_close = on_close
        self._is_first_item_sent = False
        self._is_closed = False

    async def next_item(self, stop: trio.Event) -> object | None:
        """The next message to the client; an empty list is a sign of life. None: `stop` is set, and the last events
        went out."""
        if not self._is_first_item_sent:
            self._is_first_item_sent = True
            found = self._blind_spots
            return {
                "open_passthrough": found.passthrough_opens,
                "open_daemon": found.daemon_opens,
                "hidden": found.hidden_names,
            }
        waited = 0.0
        while (
            not (events := self._tracer.take_events(_BATCH_EVENTS))
            and not stop.is_set()
            and waited < _HEARTBEAT_SECONDS
        ):
            waited += _POLL_SECONDS
            with trio.move_on_after(_POLL_SECONDS):
                await stop.wait()
        if events or not stop.is_set():
            return events
        await trio.sleep(_SETTLE_SECONDS)
        return self._tracer.take_events(_BATCH_EVENTS) or None

    def result(self) -> object:
        """How many events nobody fetched in time."""
        return {"lost": self._tracer.lost_events}

    async def close(self) -> None:
        """End the trace; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await self._on_close()
