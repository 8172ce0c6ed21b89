"""What the service counts, for Prometheus. Labels are bounded: route templates, never raw paths.

The first models that a process answers for, up to a number, have series of their own; those after
them share the label `other`, so that ten thousand models do not make a million series.

BentoML's own metrics label the raw path, so every unknown URL would make a new series; they are
off. BentoML sets `PROMETHEUS_MULTIPROC_DIR`, so that any process answers `/metrics` for all of
them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache, cached_property
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
MODEL_REQUESTS = Counter(
    "graft_model_requests", "Inferences by model and outcome.", ["model", "outcome"]
)
MODEL_ROWS = Counter("graft_model_rows", "Inputs by model and outcome.", ["model", "outcome"])
MODEL_SECONDS = Histogram(
    "graft_model_seconds", "Time of an inference, in seconds.", ["model"], buckets=SECONDS
)
STAGE_SECONDS = Histogram(
    "graft_model_stage_seconds",
    "Time of an inference in one stage: prepare, queue, trunk or head.",
    ["model", "stage"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5),
)
BATCH_ROWS = Histogram(
    "graft_batch_rows", "Rows in one run of a trunk.", ["trunk"], buckets=(1, 2, 4, 8, 16, 32, 64)
)
LIVE_VERSIONS = Gauge(
    "graft_live_versions", "Versions that a process serves.", multiprocess_mode="livemin"
)
LIVE_BYTES = Gauge(
    "graft_live_bytes",
    "Memory of a process's loaded heads and their own trunks.",
    multiprocess_mode="livemax",
)
SHADOW_ROWS = Counter(
    "graft_shadow_rows",
    "Rows of shadows by model: agreed, disagreed, failed or dropped.",
    ["model", "outcome"],
)
SPLIT_ROWS = Counter(
    "graft_split_rows",
    "Rows of releases that split traffic, by who answered: the newest version or the others.",
    ["model", "side", "outcome"],
)
ROLLBACKS = Counter(
    "graft_rollbacks", "Releases that the service took back by itself, by model.", ["model"]
)
LOADS = Counter("graft_loads", "Versions loaded or refused.", ["outcome"])
EVICTIONS = Counter("graft_evictions", "Heads taken out of memory to stay within the budget.")
QUEUED_ROWS = Gauge(
    "graft_queued_rows",
    "Rows that wait for a trunk, or to be decoded.",
    ["trunk"],
    multiprocess_mode="livesum",
)
REFUSED_ROWS = Counter("graft_refused_rows", "Rows refused because too many waited.", ["trunk"])
OTHER_MODELS = "other"
SHADOW_OUTCOMES = ("agreed", "disagreed", "failed", "dropped")
SIDES = ("newest", "others")
"""Of a split. Versions as labels would be more and more series; which is the newest, the release
says."""


@cache
def request_meters(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """Return the series of an answer, bound once; the route is a template, or `other`."""
    requests = REQUESTS.labels(method=method, route=route, status=str(status))
    return requests, REQUEST_SECONDS.labels(route=route)


class ModelMeters:
    """The series of one model, bound once: looking labels up costs more than counting."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._requests: dict[str, Counter] = {}
        self._ok = MODEL_ROWS.labels(model=model, outcome="ok")
        self._failed = MODEL_ROWS.labels(model=model, outcome="error")
        self._seconds = MODEL_SECONDS.labels(model=model)
        self._stages: dict[str, Histogram] = {}
        self.rollbacks = ROLLBACKS.labels(model=model)

    def requests(self, outcome: str) -> Counter:
        """The counter of inferences that ended so: `ok`, or the code of an error."""
        if outcome not in self._requests:
            self._requests[outcome] = MODEL_REQUESTS.labels(model=self._model, outcome=outcome)
        return self._requests[outcome]

    def observe(
        self, rows: int, failed_rows: int, seconds: float, stages: Iterable[tuple[str, float]]
    ) -> None:
        """Count an inference that was answered."""
        self._ok.inc(rows - failed_rows)
        if failed_rows:
            self._failed.inc(failed_rows)
        self._seconds.observe(seconds)
        for stage, spent in stages:
            if stage not in self._stages:
                self._stages[stage] = STAGE_SECONDS.labels(model=self._model, stage=stage)
            self._stages[stage].observe(spent)

    @cached_property
    def shadow_rows(self) -> dict[str, Counter]:
        """By outcome; only of a model that has had a shadow."""
        return {
            each: SHADOW_ROWS.labels(model=self._model, outcome=each) for each in SHADOW_OUTCOMES
        }

    @cached_property
    def split_rows(self) -> dict[str, tuple[Counter, Counter]]:
        """(rows that were answered, that failed) by side; only of a model that has been split."""
        return {side: (self._split(side, "ok"), self._split(side, "error")) for side in SIDES}

    def _split(self, side: str, outcome: str) -> Counter:
        return SPLIT_ROWS.labels(model=self._model, side=side, outcome=outcome)


class ModelLabels:
    """Which models of this process have series of their own: the first `limit` that answer."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._meters: dict[str, ModelMeters] = {}
        self._others = ModelMeters(OTHER_MODELS)

    def meters(self, model: str) -> ModelMeters:
        """Return the series to count a model under; only give it models that exist."""
        found = self._meters.get(model)
        if found is None:
            if len(self._meters) >= self._limit:
                return self._others
            found = self._meters[model] = ModelMeters(model)
        return found


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
    forget_dead_processes()  # one that was killed may have been seen as alive by its successor
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
