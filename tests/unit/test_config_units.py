"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.config.units import format_size, parse_amount, parse_duration, parse_size, resolve_amount
from fusecache.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1 kB", 1000),
        ("500GiB", 500 << 30),
        ("500G", 500 << 30),
        ("500gb", 500 * 10**9),
        ("1.5MiB", 3 << 19),
        ("2T", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.5", "5 bananas", "1e9", "GiB", -1, True])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "amount"), [("80%", "80%"), (" 12.50 % ", "12.5%"), ("1G", 1 << 30), (5, 5)]
)
def test_amounts(text: str | int, amount: int | str) -> None:
    assert parse_amount(text) == amount


@pytest.mark.parametrize("text", ["101%", "%", "-5%", "five"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_amount(text)


def test_shares_of_a_disk() -> None:
    assert resolve_amount("80%", 1000) == 800
    assert resolve_amount(5, 1000) == 5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60", 60),
        (60, 60),
        (0.5, 0.5),
        ("90s", 90),
        ("5m", 300),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("2d", 172800),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", float("inf"), float("nan"), -1, True])
def test_no_durations(text: str | float) -> None:
    with pytest.raises(ConfigError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 62))
def test_what_is_shown_can_be_read_back(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= max(size * 0.05, 1)
