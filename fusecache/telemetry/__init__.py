"""What a mount tells about itself: logs and metrics."""

from fusecache.telemetry.logs import configure_logging
from fusecache.telemetry.metrics import METRICS, StatusCollector
from fusecache.telemetry.server import MetricsServer

__all__ = ["METRICS", "MetricsServer", "StatusCollector", "configure_logging"]
