"""The settings of fetching."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FetchSettings:
    """`concurrency` threads fetch from the origins, at most `range_bytes` per request; a waiter and a flight have
    `deadline` seconds. `prefetch`: all of a file is fetched once a reader reads any of it."""

    concurrency: int = 16
    range_bytes: int = 16 << 20
    deadline: float = 60.0
    prefetch: bool = True
