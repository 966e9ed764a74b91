"""The /metrics page: an HTTP server on 127.0.0.1, in a thread of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.registry import Collector

from fusecache.errors import ConfigError


class MetricsServer:
    """Serves the metrics of `collector` at http://127.0.0.1:`port`/metrics until closed. Loopback only:
    metrics name sources, and the page has no authentication. Raises ConfigError when the port is taken."""

    def __init__(self, port: int, collector: Collector) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        try:
            self._server, self._thread = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise ConfigError(f"metrics_port {port}: {error.strerror}") from error
        self.port = int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving; returns when the thread has ended."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def render_metrics(collector: Collector) -> str:
    """The page that MetricsServer serves, as text."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()
