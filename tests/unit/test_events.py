"""Events: told to all subscribers, in order, by the thread that publishes."""

from __future__ import annotations

import logging
import threading

import pytest

from fusecache.events import Event, EventHub
from fusecache.types import ObjectVersion

VERSION = ObjectVersion("memory://", "a", "1", 1, 0)


def test_subscribers_are_called_in_the_order_of_subscription() -> None:
    event: Event[[int]] = Event()
    heard: list[tuple[str, int]] = []
    event.publish(1)
    event.subscribe(lambda number: heard.append(("first", number)))
    event.subscribe(lambda number: heard.append(("second", number)))
    event.publish(2)
    assert heard == [("first", 2), ("second", 2)]


def test_a_subscriber_that_fails_is_logged_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    event: Event[[]] = Event()
    heard: list[str] = []

    def fail() -> None:
        raise ValueError("broken")

    event.subscribe(fail)
    event.subscribe(lambda: heard.append("told"))
    with caplog.at_level(logging.ERROR, "fusecache.events"):
        event.publish()
    assert heard == ["told"]
    assert "a subscriber failed" in caplog.text


def test_publish_runs_in_the_thread_that_publishes() -> None:
    event: Event[[]] = Event()
    heard: list[int] = []
    event.subscribe(lambda: heard.append(threading.get_ident()))
    thread = threading.Thread(target=event.publish)
    thread.start()
    thread.join()
    assert heard == [thread.ident]


def test_a_subscription_during_a_publication_counts_from_the_next_one() -> None:
    event: Event[[]] = Event()
    heard: list[str] = []

    def subscribe_another() -> None:
        event.subscribe(lambda: heard.append("late"))

    event.subscribe(subscribe_another)
    event.publish()
    assert heard == []
    event.publish()
    assert heard == ["late"]


def test_each_hub_and_each_event_has_its_own_subscribers() -> None:
    one, other = EventHub(), EventHub()
    heard: list[ObjectVersion] = []
    one.object_completed.subscribe(heard.append)
    other.object_completed.publish(VERSION)
    one.object_gone.publish(VERSION)
    assert heard == []
    one.object_completed.publish(VERSION)
    assert heard == [VERSION]
