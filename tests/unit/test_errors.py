"""first_error: which error of a group is shown."""

from __future__ import annotations

from fusecache.errors import ConfigError, FusecacheError, first_error


def test_an_error_of_ours_is_preferred() -> None:
    ours = ConfigError("a wrong option")
    group = BaseExceptionGroup("", [ValueError(), BaseExceptionGroup("", [KeyboardInterrupt(), ours])])
    assert first_error(group) is ours


def test_otherwise_the_first_one_is_shown() -> None:
    first = KeyError("x")
    group = ExceptionGroup("", [ExceptionGroup("", [first]), ValueError()])
    assert first_error(group) is first
    assert first_error(group, preferred=FusecacheError) is first
    assert isinstance(first_error(group, preferred=ValueError), ValueError)


def test_what_is_no_group_is_shown_itself() -> None:
    alone = OSError("disk")
    assert first_error(alone) is alone
