"""Every metric: its name, unit, meaning, and where the status holds it. There is no other list.

The values are those of `fusecache status`, read when Prometheus asks: nothing is counted twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricDefinition:
    """One metric. `name` ends in its unit (and `_total` for a counter, which only grows while the daemon
    runs). `status_path` leads to it in the status; with a `label`, to an object whose keys are the label's values:
    those in `label_values`, which renames them, or all."""

    name: str
    kind: Literal["counter", "gauge"]
    status_path: str
    meaning: str
    label: str = ""
    label_values: Mapping[str, str] | None = None


METRICS: tuple[MetricDefinition, ...] = (
    MetricDefinition(
        "fusecache_served_bytes_total",
        "counter",
        "bytes",
        "Bytes that the daemon served, by the tier they came from. Passthrough reads are not seen by it.",
        "tier",
        {"store": "store", "peer": "peer", "origin": "origin"},
    ),
    MetricDefinition(
        "fusecache_opens_total",
        "counter",
        "opens",
        "Opens of files, by the side that answers their reads: the kernel (passthrough) or the daemon.",
        "by",
        {"passthrough": "passthrough", "daemon": "daemon"},
    ),
    MetricDefinition(
        "fusecache_cache_used_bytes", "gauge", "cache.used", "Bytes in the cache, disk and memory."
    ),
    MetricDefinition("fusecache_cache_limit_bytes", "gauge", "cache.limit", "Most bytes to keep there."),
    MetricDefinition(
        "fusecache_cache_memory_used_bytes", "gauge", "cache.memory_used", "Bytes of it in memory."
    ),
    MetricDefinition(
        "fusecache_cache_memory_limit_bytes", "gauge", "cache.memory_limit", "Most bytes in memory."
    ),
    MetricDefinition(
        "fusecache_cache_objects",
        "gauge",
        "cache",
        "Object versions in the cache.",
        "state",
        {"objects_complete": "complete", "objects_partial": "partial"},
    ),
    MetricDefinition(
        "fusecache_cache_evictions_total", "counter", "cache.evictions", "Object versions evicted."
    ),
    MetricDefinition(
        "fusecache_cache_corrupt_blocks_total",
        "counter",
        "cache.corrupt_blocks",
        "Blocks whose checksum was wrong; they were fetched again.",
    ),
    MetricDefinition("fusecache_cache_sick", "gauge", "cache.sick", "1 while the cache disk is bypassed."),
    MetricDefinition(
        "fusecache_origin_requests_total", "counter", "origin.requests", "Requests to the sources."
    ),
    MetricDefinition("fusecache_origin_errors_total", "counter", "origin.errors", "Requests that failed."),
    MetricDefinition(
        "fusecache_origin_throttled_total",
        "counter",
        "origin.throttled",
        "Requests answered with 429 or 503.",
    ),
    MetricDefinition("fusecache_origin_retries_total", "counter", "origin.retries", "Requests made again."),
    MetricDefinition("fusecache_origin_lists_total", "counter", "origin.lists", "LIST requests."),
    MetricDefinition("fusecache_origin_received_bytes_total", "counter", "origin.bytes", "Bytes received."),
    MetricDefinition(
        "fusecache_origin_concurrency", "gauge", "origin.concurrency", "Most requests in flight, as adapted."
    ),
    MetricDefinition(
        "fusecache_peers_received_bytes_total", "counter", "peers.bytes_in", "Bytes from other nodes."
    ),
    MetricDefinition(
        "fusecache_peers_sent_bytes_total", "counter", "peers.bytes_out", "Bytes to other nodes."
    ),
    MetricDefinition("fusecache_peers_nodes", "gauge", "peers.nodes", "Nodes of the cluster that are alive."),
    MetricDefinition(
        "fusecache_peers_errors_total", "counter", "peers.errors", "Requests to other nodes that failed."
    ),
    MetricDefinition(
        "fusecache_peers_bad_blocks_total",
        "counter",
        "peers.bad_blocks",
        "Blocks from other nodes whose checksum was wrong; they were fetched elsewhere.",
    ),
    MetricDefinition(
        "fusecache_peers_fallbacks_total",
        "counter",
        "peers.fallbacks",
        "Flights that went to the origin because the nodes before this one did not answer.",
    ),
    MetricDefinition(
        "fusecache_peers_refused_total", "counter", "peers.refused", "Requests that found no turn in time."
    ),
    MetricDefinition(
        "fusecache_peers_sending", "gauge", "peers.sending", "Answers to other nodes under way."
    ),
    MetricDefinition(
        "fusecache_loader_waiting_reads", "gauge", "loader.waiting_reads", "Reads that wait for a block."
    ),
    MetricDefinition(
        "fusecache_loader_fetching_bytes", "gauge", "loader.bytes_to_fetch", "Bytes still to fetch ahead."
    ),
    MetricDefinition(
        "fusecache_orders_stored", "gauge", "orders.stored", "Recordings of how models are read."
    ),
    MetricDefinition("fusecache_orders_recorded_total", "counter", "orders.recorded", "Recordings made."),
    MetricDefinition(
        "fusecache_orders_replayed_total", "counter", "orders.replayed", "Cold loads that followed one."
    ),
    MetricDefinition(
        "fusecache_orders_wrong_total", "counter", "orders.wrong", "Loads that read otherwise than recorded."
    ),
    MetricDefinition(
        "fusecache_orders_received_total",
        "counter",
        "orders.from_nodes",
        "Recordings that came from other nodes.",
    ),
    MetricDefinition("fusecache_catalog_files", "gauge", "catalog.files", "Files in the tree."),
    MetricDefinition("fusecache_catalog_bytes", "gauge", "catalog.bytes", "Sum of their sizes."),
    MetricDefinition("fusecache_catalog_age_seconds", "gauge", "catalog.age", "Age of the listing."),
    MetricDefinition(
        "fusecache_errors_total", "counter", "errors", "Errors that readers got, by kind.", label="kind"
    ),
    MetricDefinition("fusecache_process_resident_bytes", "gauge", "process.rss", "Memory of the daemon."),
    MetricDefinition(
        "fusecache_process_cpu_seconds_total", "counter", "process.cpu_seconds", "CPU time of the daemon."
    ),
    MetricDefinition("fusecache_process_uptime_seconds", "gauge", "process.uptime", "Age of the daemon."),
    MetricDefinition(
        "fusecache_process_restarts_total", "counter", "process.restarts", "Times the daemon was restarted."
    ),
)


class StatusCollector(Collector):
    """Turns a status into metrics. `status` is called from the thread of the HTTP server, so it has to be
    thread-safe; while it fails, `fusecache_up` is 0 and the rest is missing."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """All metrics that the status has values for."""
        up = GaugeMetricFamily("fusecache_up", "1 while the daemon can tell its status.")
        try:
            status = self._status()
        except Exception as error:
            _log.warning("metrics: no status: %s", error)
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        mode = GaugeMetricFamily("fusecache_passthrough", "1 when the kernel reads complete files by itself.")
        mode.add_metric([], 1 if _status_value(status, "mode.now") == "passthrough" else 0)
        yield mode
        for definition in METRICS:
            family = _make_family(definition, _status_value(status, definition.status_path))
            if family.samples:
                yield family


def _make_family(definition: MetricDefinition, found: Any) -> Metric:
    labels = [definition.label] if definition.label else []
    kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(
        definition.name, definition.meaning, labels=labels or None
    )
    if not labels:
        if _is_number(found):
            family.add_metric([], float(found))
    elif isinstance(found, Mapping):
        for key, value in found.items():
            name = key if definition.label_values is None else definition.label_values.get(key)
            if name is not None and _is_number(value):
                family.add_metric([name], float(value))
    return family


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _status_value(status: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(status, Mapping) or key not in status:
            return None
        status = status[key]
    return status
