"""How long an open waits for its file to be whole."""

from __future__ import annotations

import math

from fusecache_mount.fs.open_wait import OpenWaitPolicy


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
