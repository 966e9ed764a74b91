"""A trace begins, streams and ends, and leaves the mount as it was, with a mount that only remembers."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from fusecache.errors import ConfigError, MountError
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.tracing.session import TraceController


class RememberingMount:
    """A mount that remembers what a trace changed about it."""

    def __init__(self) -> None:
        self.changes: list[str] = []
        self.error: OSError | None = None

    def device_number(self) -> str:
        return "0:39"

    def disable_read_ahead(self) -> None:
        self.changes.append("disable_read_ahead")

    def restore_read_ahead(self) -> None:
        self.changes.append("restore_read_ahead")

    def pass_writes(self) -> None:
        if self.error is not None:
            raise self.error
        self.changes.append("pass_writes")

    def refuse_writes(self) -> None:
        self.changes.append("refuse_writes")


class Bench:
    def __init__(self) -> None:
        self.mount = RememberingMount()
        self.switch = TraceSwitch()
        entries = [
            SimpleNamespace(nodeid=1, parent=1, name=b""),
            SimpleNamespace(nodeid=7, parent=1, name=b"a"),
        ]
        nodes = SimpleNamespace(entry_by_nodeid=lambda _nodeid: None, retained_entries=lambda: entries)
        self.expired: list[tuple[int, bytes]] = []

        def expire_entries(names: list[tuple[int, bytes]], _deadline: float) -> int:
            self.expired += names
            return 3

        self.controller = TraceController(
            self.mount,
            cast(Any, SimpleNamespace(nodes=nodes)),
            cast(Any, SimpleNamespace(count_open_nodeids=lambda: (2, 1))),
            cast(Any, SimpleNamespace(supports_expire=True, expire_entries=expire_entries)),
            trace_switch=self.switch,
            negative_lookups=[(7, b"missing"), (1, b"a")],
        )


async def test_a_trace_says_first_what_it_can_not_see() -> None:
    bench = Bench()
    stream = await bench.controller.start_trace({})
    assert await stream.next_item(trio.Event()) == {"open_passthrough": 2, "open_daemon": 1, "hidden": 3}
    assert bench.expired == [(7, b"missing"), (1, b"a")]  # each name once, and not the root
    assert bench.mount.changes == []
    await stream.close()


async def test_events_come_until_the_client_stops() -> None:
    bench = Bench()
    stream = await bench.controller.start_trace({})
    stop = trio.Event()
    await stream.next_item(stop)
    observer = bench.switch.observer
    assert observer is not None
    observer.request_received((40, 17, 5, 1, 0, 0, 0, 0, 0), memoryview(bytes(40)))
    observer.request_answered(5, -errno.EIO)
    (event,) = cast(list[dict[str, Any]], await stream.next_item(stop))
    assert (event["op"], event["error"]) == ("statfs", "EIO")
    stop.set()
    assert await stream.next_item(stop) is None
    assert stream.result() == {"lost": 0}
    await stream.close()


async def test_the_end_undoes_what_the_trace_changed_and_only_once() -> None:
    bench = Bench()
    stream = await bench.controller.start_trace({"exact": True, "writes": True})
    assert bench.switch.is_on
    assert bench.controller.is_running
    with pytest.raises(ConfigError, match="is running already"):
        await bench.controller.start_trace({})
    await stream.close()
    await stream.close()
    assert bench.mount.changes == [
        "disable_read_ahead",
        "pass_writes",
        "refuse_writes",
        "restore_read_ahead",
    ]
    assert not bench.switch.is_on
    assert not bench.controller.is_running
    await (await bench.controller.start_trace({})).close()


async def test_a_trace_that_can_not_begin_leaves_the_mount_as_it_was() -> None:
    bench = Bench()
    bench.mount.error = OSError(errno.EPERM, "Operation not permitted")
    with pytest.raises(
        MountError, match="--writes: Operation not permitted: only for a mount that root made"
    ):
        await bench.controller.start_trace({"exact": True, "writes": True})
    assert bench.mount.changes == ["disable_read_ahead", "refuse_writes", "restore_read_ahead"]
    assert not bench.switch.is_on
    assert not bench.controller.is_running
