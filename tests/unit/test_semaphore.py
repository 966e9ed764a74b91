"""ResizableSemaphore and wait_cancellable: turns in order, deadlines, readers that go away."""

from __future__ import annotations

import threading
import time

import pytest

from fusecache.errors import CancelledReadError, UnavailableError
from fusecache.semaphore import ResizableSemaphore, wait_cancellable


def test_slots_are_given_in_order_and_not_beyond_the_deadline() -> None:
    slots = ResizableSemaphore(lambda: 1)
    with slots.hold_slot(time.monotonic, time.monotonic() + 10, lambda: False):
        with (
            pytest.raises(UnavailableError),
            slots.hold_slot(time.monotonic, time.monotonic(), lambda: False),
        ):
            pass
        with (
            pytest.raises(CancelledReadError),
            slots.hold_slot(time.monotonic, time.monotonic() + 10, lambda: True),
        ):
            pass
        got = threading.Event()

        def wait() -> None:
            with slots.hold_slot(time.monotonic, time.monotonic() + 20, lambda: False):
                got.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not got.is_set()
    assert got.wait(20)
    thread.join(20)


def test_a_size_that_grows_is_noticed_by_the_threads_that_wait() -> None:
    size = 1
    slots = ResizableSemaphore(lambda: size)
    assert slots.take_slot(time.monotonic, time.monotonic() + 10, lambda: False)
    got = threading.Event()

    def wait() -> None:
        if slots.take_slot(time.monotonic, time.monotonic() + 20, lambda: False):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    size = 2
    assert got.wait(20)
    thread.join(20)


def test_a_wait_ends_with_the_event_the_deadline_or_the_reader() -> None:
    event = threading.Event()
    assert not wait_cancellable(event, lambda: 5.0, 5.0, lambda: False)
    assert not wait_cancellable(event, lambda: 0.0, 5.0, lambda: True)
    polls: list[int] = []

    def set_at_second_poll() -> None:
        polls.append(1)
        if len(polls) == 2:
            event.set()

    assert wait_cancellable(event, lambda: 0.0, 5.0, lambda: False, set_at_second_poll)
    assert len(polls) == 2
    assert wait_cancellable(event, lambda: 0.0, 5.0, lambda: True), "it is set already"
