"""A lock says whether the thread that asks holds it."""

from __future__ import annotations

import threading

import pytest

from fusecache.locking import DEBUG_VARIABLE, OwnedLock


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> OwnedLock:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    return OwnedLock()


def test_the_tests_check_locks() -> None:
    with pytest.raises(AssertionError):
        OwnedLock().assert_held()


def test_only_the_thread_that_holds_a_lock_passes_the_assertion(lock: OwnedLock) -> None:
    with pytest.raises(AssertionError):
        lock.assert_held()
    failures: list[AssertionError] = []

    def ask() -> None:
        try:
            lock.assert_held()
        except AssertionError as error:
            failures.append(error)

    with lock:
        lock.assert_held()
        assert lock.locked()
        other = threading.Thread(target=ask)
        other.start()
        other.join()
    assert len(failures) == 1
    assert not lock.locked()
    with pytest.raises(AssertionError):
        lock.assert_held()


def test_a_thread_that_takes_its_lock_twice_is_told_so(lock: OwnedLock) -> None:
    with lock:
        with pytest.raises(AssertionError):
            lock.acquire()
        assert not lock.acquire(blocking=False)


def test_a_condition_frees_the_lock_while_it_waits(lock: OwnedLock) -> None:
    condition = lock.new_condition()
    is_due = False

    def tell() -> None:
        nonlocal is_due
        with lock:
            is_due = True
            condition.notify()

    with condition:
        other = threading.Thread(target=tell)
        other.start()
        assert condition.wait_for(lambda: is_due, timeout=10)
        lock.assert_held()
    other.join()
    with pytest.raises(RuntimeError):
        condition.notify()


def test_without_checks_nothing_is_asserted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEBUG_VARIABLE)
    OwnedLock().assert_held()
