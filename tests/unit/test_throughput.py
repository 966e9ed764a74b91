"""How fast bytes arrive: the best second."""

from __future__ import annotations

from fusecache.throughput import PEAK_LIFETIME, PeakThroughput


def test_the_best_second_counts_for_a_while() -> None:
    best = PeakThroughput()
    for tick in range(10):
        best.add_arrival(tick / 10, 100)
    fast = best.bytes_per_second(1.0)
    assert fast is not None
    assert fast > 900
    for tick in range(20, 100):
        best.add_arrival(tick / 10, 10)
    assert best.bytes_per_second(10.0) == fast
    slow = best.bytes_per_second(PEAK_LIFETIME + 2)
    assert slow is not None
    assert slow < 200
