"""The sections of a status, as JSON-able dictionaries: a mount and `fusecache serve` put theirs together of them.

The keys are what `fusecache status --json` prints and fusecache.telemetry.metrics reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

_ORIGIN_COUNTERS = ("requests", "errors", "throttled", "retries", "lists", "bytes", "concurrency")


class NamedSource(Protocol):
    """A configured source."""

    @property
    def name(self) -> str:
        """Its name, empty for the only one."""

    @property
    def url(self) -> str:
        """Its URL, which holds no secret."""


class OriginCounters(Protocol):
    """The counters of one origin since the start, and its requests in flight."""

    requests: int
    errors: int
    throttled: int
    retries: int
    lists: int
    bytes: int

    @property
    def concurrency(self) -> int:
        """Requests that may be in flight now."""


class FetchCounters(Protocol):
    """The counters of a fetch service since the start."""

    flights: int
    flights_failed: int
    bytes_uncached: int


def source_rows(sources: Iterable[NamedSource]) -> list[dict[str, Any]]:
    """Name and URL of each source."""
    return [{"name": source.name, "url": source.url} for source in sources]


def bytes_section(origin_stats: Iterable[OriginCounters], *, peer_bytes: int) -> dict[str, int]:
    """Bytes that came from other nodes and from the origins."""
    return {"peer": peer_bytes, "origin": sum(stats.bytes for stats in origin_stats)}


def origin_section(origin_stats: Iterable[OriginCounters]) -> dict[str, int]:
    """The counters of all origins together."""
    counters = list(origin_stats)
    return {name: sum(getattr(stats, name) for stats in counters) for name in _ORIGIN_COUNTERS}


def loader_section(progress: Mapping[str, Any], stats: FetchCounters) -> dict[str, Any]:
    """The fetches in progress, and the flights until now."""
    return {**progress, "flights": stats.flights}


def process_section(started_at: float) -> dict[str, Any]:
    """This process; `started_at` is a time of time.monotonic()."""
    return {
        "pid": os.getpid(),
        "cpu_seconds": time.process_time(),
        "uptime": time.monotonic() - started_at,
    }


def resident_bytes() -> int:
    """Memory of this process that is in RAM, shared pages included."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
