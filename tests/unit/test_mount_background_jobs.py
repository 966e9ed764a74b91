"""Jobs that are done in the background: their order, those for later, and the end."""

from __future__ import annotations

import threading

import pytest

from fusecache_mount.fs.background_jobs import BackgroundJobs


def test_jobs_are_done_in_order_also_those_from_before_the_start() -> None:
    jobs = BackgroundJobs()
    done: list[int] = []
    for number in range(3):
        jobs.run_in_background(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == []
    jobs.start()
    jobs.run_in_background(lambda: done.append(3))
    jobs.close()
    assert done == [0, 1, 2, 3]


def test_a_job_for_sooner_is_done_before_one_for_later() -> None:
    jobs = BackgroundJobs()
    done: list[str] = []
    is_done = threading.Event()

    def finish() -> None:
        done.append("sooner")
        is_done.set()

    jobs.run_later(3600, lambda: done.append("later"))
    jobs.run_later(0.01, finish)
    jobs.start()
    assert is_done.wait(20)
    jobs.close()
    assert done == ["sooner"]


def test_a_job_for_later_holds_up_neither_others_nor_the_end() -> None:
    jobs = BackgroundJobs()
    done: list[str] = []
    jobs.run_later(3600, lambda: done.append("never"))
    jobs.run_in_background(lambda: done.append("now"))
    jobs.start()
    jobs.close()
    assert done == ["now"]
    assert not jobs._thread.is_alive()


def test_a_job_that_fails_is_logged_and_the_next_one_done(caplog: pytest.LogCaptureFixture) -> None:
    jobs = BackgroundJobs()
    done: list[str] = []
    jobs.run_in_background(lambda: [][1])
    jobs.run_in_background(lambda: done.append("next"))
    jobs.start()
    jobs.close()
    assert done == ["next"]
    assert "IndexError" in caplog.text
