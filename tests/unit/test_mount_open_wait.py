"""How long an open waits for its file to be complete, and that all who wait for one file are woken."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from fusecache.events import EventHub
from fusecache.types import ObjectVersion
from fusecache_mount.fs.background_jobs import BackgroundJobs
from fusecache_mount.fs.open_wait import OpenWait, OpenWaitPolicy

SHARD = ObjectVersion("s3://b", "model.safetensors", "e", 10, 5)


def test_a_file_that_will_be_whole_in_time_is_waited_for() -> None:
    patience = OpenWaitPolicy(5.0, 100.0)
    assert not patience.check_wait_over(100.0, None)
    assert not patience.check_wait_over(101.0, 3.9)
    assert not patience.check_wait_over(104.9, 0.1)


def test_a_pause_of_the_network_ends_no_wait() -> None:
    patience = OpenWaitPolicy(5.0, 0.0)
    assert not patience.check_wait_over(1.0, 60.0)
    assert not patience.check_wait_over(1.4, 60.0)
    assert not patience.check_wait_over(1.5, 2.0)  # it goes on
    assert not patience.check_wait_over(1.6, 60.0)
    assert not patience.check_wait_over(2.0, 60.0)
    assert patience.check_wait_over(2.1, 60.0)


def test_a_file_that_does_not_come_is_not_waited_for() -> None:
    assert OpenWaitPolicy(5.0, 0.0).check_wait_over(0.0, math.inf)


def test_the_limit_ends_a_wait_of_which_nobody_knows_the_end() -> None:
    patience = OpenWaitPolicy(5.0, 0.0)
    assert not patience.check_wait_over(5.1, None)
    assert patience.check_wait_over(5.6, None)


class Fetches:
    """A fetch service whose one object arrives when the test says so, and nobody knows when that will be."""

    def __init__(self) -> None:
        self.stored = SimpleNamespace(is_complete=False)
        self.open_count = 0

    def open_object(self, version: ObjectVersion, source: str) -> Any:
        self.open_count += 1
        return SimpleNamespace(version=version, stored=self.stored)

    def release_fetch(self, object_fetch: Any) -> None:
        self.open_count -= 1

    def fetch_whole_file(self, object_fetch: Any) -> None:
        pass

    def seconds_until_complete(self, object_fetch: Any) -> float | None:
        return None


class Openers:
    """Opens of one file that wait, on a clock that stands still: only the event of its completion can wake them."""

    def __init__(self) -> None:
        self.fetches = Fetches()
        self.events = EventHub()
        self.jobs = BackgroundJobs()
        self.wait = OpenWait(
            cast(Any, self.fetches),
            self.jobs,
            self.events,
            limit_seconds=5.0,
            waits_for=lambda key: key.endswith(".safetensors"),
            limiter=trio.CapacityLimiter(4),
        )
        self.opened: list[str] = []

    async def open(self, name: str, scope: trio.CancelScope) -> None:
        with scope:
            await self.wait.await_completion(SHARD, "")
            self.opened.append(name)

    async def start(self, nursery: trio.Nursery, *names: str) -> list[trio.CancelScope]:
        """Begin these opens; returns, in their order, what cancels each, when all of them wait."""
        scopes = [trio.CancelScope() for _ in names]
        for name, scope in zip(names, scopes, strict=True):
            nursery.start_soon(self.open, name, scope)
        while len(self.wait._waits) != 1 or self.wait._waits[SHARD.id].opener_count < len(names):
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        return scopes

    def complete(self) -> None:
        self.fetches.stored.is_complete = True
        self.events.object_completed.publish(SHARD)


def test_only_files_of_weights_are_waited_for() -> None:
    openers = Openers()
    assert openers.wait.should_wait(SHARD)
    assert not openers.wait.should_wait(ObjectVersion("s3://b", "config.json", "e", 10, 5))
    assert not openers.wait.should_wait(ObjectVersion("s3://b", "empty.safetensors", "e", 0, 5))


async def test_all_openers_of_a_file_wake_when_it_is_complete(mock_clock: trio.testing.MockClock) -> None:
    openers = Openers()
    async with trio.open_nursery() as nursery:
        await openers.start(nursery, "one", "two")
        openers.complete()
    assert sorted(openers.opened) == ["one", "two"]
    assert openers.wait._waits == {}


async def test_an_opener_that_leaves_early_leaves_the_event_to_the_others(
    mock_clock: trio.testing.MockClock,
) -> None:
    openers = Openers()
    async with trio.open_nursery() as nursery:
        first, _ = await openers.start(nursery, "one", "two")
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        openers.complete()  # the poll would find it, too, but the clock stands still
    assert openers.opened == ["two"]
    assert openers.wait._waits == {}
    openers.jobs.start()
    openers.jobs.close()
    assert openers.fetches.open_count == 1  # of "two", who gives it back after the open


async def test_a_version_that_nobody_waits_for_wakes_nobody() -> None:
    openers = Openers()
    openers.complete()
    assert openers.wait._waits == {}
