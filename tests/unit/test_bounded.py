"""BoundedDict: what it keeps, in which order, for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.bounded import BoundedDict


def test_the_oldest_entry_goes_first() -> None:
    kept: BoundedDict[str, int] = BoundedDict(2)
    kept["a"], kept["b"], kept["c"] = 1, 2, 3
    assert dict(kept) == {"b": 2, "c": 3}
    assert "a" not in kept
    assert kept.get("a") is None
    with pytest.raises(KeyError):
        kept["a"]


def test_assigned_again_is_the_newest() -> None:
    kept: BoundedDict[str, int] = BoundedDict(2)
    kept["a"], kept["b"] = 1, 2
    kept["a"] = 10
    kept["c"] = 3
    assert list(kept.items()) == [("a", 10), ("c", 3)]


def test_reading_moves_nothing() -> None:
    kept: BoundedDict[str, int] = BoundedDict(2)
    kept["a"], kept["b"] = 1, 2
    assert kept["a"] == 1
    kept["c"] = 3
    assert list(kept) == ["b", "c"]


def test_weights_are_summed() -> None:
    kept: BoundedDict[str, str] = BoundedDict(5, weigh=len)
    kept["a"], kept["b"], kept["c"] = "xx", "yy", "z"
    assert kept.weight == 5
    kept["d"] = "www"
    assert list(kept) == ["c", "d"]
    assert kept.weight == 4
    del kept["c"]
    assert kept.weight == 3
    kept["e"] = "far too long"
    assert list(kept) == ["e"], "the newest stays, whatever it weighs"
    kept.clear()
    assert kept.weight == 0
    assert not kept


def test_a_smaller_maximum_drops_at_once() -> None:
    kept: BoundedDict[int, int] = BoundedDict(10, weigh=lambda value: value)
    kept[1], kept[2], kept[3] = 3, 3, 4
    kept.set_maximum(7)
    assert list(kept) == [2, 3]
    kept.set_maximum(0)
    assert list(kept) == [3]


def test_entries_expire() -> None:
    now = 100.0
    kept: BoundedDict[str, int] = BoundedDict(10, max_age=5.0, clock=lambda: now)
    kept["a"] = 1
    now = 103.0
    kept["b"] = 2
    assert list(kept) == ["a", "b"]
    now = 105.0
    assert "a" not in kept
    assert kept.get("a", 7) == 7
    with pytest.raises(KeyError):
        del kept["a"]
    assert kept.weight == len(kept) == 1
    kept["b"] = 3
    now = 109.0
    assert dict(kept) == {"b": 3}, "assigned again, it lives on"
    now = 110.0
    assert not kept
    assert kept.pop("b", None) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3))), st.integers(1, 9))
def test_never_heavier_than_allowed(steps: list[tuple[int, int, int]], maximum: int) -> None:
    now = 0
    kept: BoundedDict[int, int] = BoundedDict(
        maximum, weigh=lambda value: value, max_age=4, clock=lambda: now
    )
    assigned: dict[int, tuple[int, int]] = {}
    for key, value, seconds in steps:
        now += seconds
        kept[key] = value
        assigned[key] = (value, now)
        assert kept.weight == sum(kept.values())
        assert kept.weight <= maximum or len(kept) == 1
        assert list(kept)[-1] == key
        for each, found in kept.items():
            assert found == assigned[each][0]
            assert now - assigned[each][1] < 4
