"""What the service counts, for Prometheus. Labels are bounded: route templates, never raw paths.

BentoML's own metrics label the raw path, so every unknown URL would make a new series; they are
off. BentoML sets `PROMETHEUS_MULTIPROC_DIR`, so that any process answers `/metrics` for all of
them.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

REQUESTS = Counter(
    "graft_http_requests", "HTTP requests by route and status.", ["method", "route", "status"]
)
REQUEST_SECONDS = Histogram(
    "graft_http_request_seconds", "Time to answer, in seconds.", ["route"], buckets=SECONDS
)
PREDICTED_ROWS = Counter("graft_predicted_rows", "Prediction inputs by outcome.", ["outcome"])
BATCH_ROWS = Histogram(
    "graft_batch_rows", "Rows in one run of a trunk.", ["trunk"], buckets=(1, 2, 4, 8, 16, 32, 64)
)
LIVE_VERSIONS = Gauge(
    "graft_live_versions", "Versions that a process serves.", multiprocess_mode="livemin"
)
LIVE_BYTES = Gauge(
    "graft_live_bytes", "Memory of a process's loaded heads.", multiprocess_mode="livemax"
)
EVICTIONS = Counter("graft_evictions", "Versions unloaded because memory was needed.")
LOADS = Counter("graft_loads", "Versions loaded or refused.", ["outcome"])


def forget_dead_processes() -> None:
    """Remove the gauges of processes that were killed, or their last values would stay for ever."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for path in Path(folder).glob("gauge_live*.db") if folder else ():
        process = int(path.stem.rpartition("_")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            mark_process_dead(process)  # type: ignore[no-untyped-call]
        except PermissionError:
            pass  # alive, and another user's


def render() -> tuple[bytes, str]:
    """Return the text of `/metrics` and its content type."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY), CONTENT_TYPE_LATEST
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
