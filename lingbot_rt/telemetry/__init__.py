"""What an operator sees of a server: its log and its Prometheus metrics. No torch."""

from lingbot_rt.telemetry.logs import HideKeys, configure_logging
from lingbot_rt.telemetry.metrics import Metrics

__all__ = ["HideKeys", "Metrics", "configure_logging"]
