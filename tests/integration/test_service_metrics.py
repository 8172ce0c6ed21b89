"""`/metrics`, the dashboard that reads it, and the request log, of a service that did some of all.

Every query of the dashboard is parsed, and each series that it names must be in the exposition,
with the labels that it groups and selects by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.identifiers import PRODUCTION
from core.manifests import ReleaseContent, Share
from tests.builders import TENANT, add_text_trunk, publish
from tests.integration.service_process import ROOT, ServiceProcess

DASHBOARD = json.loads((ROOT / "deploy/grafana/graft.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SECRET = "an input that no log may hold"
TRIED = ReleaseContent(
    aliases={PRODUCTION: 1},
    traffic=(Share(version=1, weight=1), Share(version=2, weight=1)),
    shadow=3,
)
MODELS = ["one", "two", "three", "four"]


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    running = ServiceProcess(
        tmp_path_factory.mktemp("busy"), workers=1, LABELLED_MODELS="2", MAX_QUEUED_ROWS="8",
        REQUEST_LOG_FRACTION="1",
    )  # fmt: skip
    trunk = add_text_trunk(running.registry)
    for name in MODELS:
        publish(running.registry, trunk, name)
    try:
        for _ in range(2):
            publish(running.registry, trunk, "one", release=False)
        running.registry.releases.append(
            TENANT, "one", lambda _: TRIED, created_by="me", reason="to be counted"
        )
        running.start()
        for name in MODELS:
            post(running, {"model": name, "inputs": ["good cat", " ", SECRET]})
        post(running, {"model": "nothing", "inputs": ["cat"]})
        post(running, {"model": "one", "inputs": ["cat"] * 9})
        for body in ({"model": "one", "inputs": SECRET}, {"model": SECRET, "inputs": [SECRET]}):
            assert httpx.post(f"{running.url}/predict", json=body).status_code == 400
        httpx.get(f"{running.url}/v1/models/{SECRET}")
        httpx.get(f"{running.url}/nowhere/{SECRET}")
        yield running
    finally:
        running.stop()


def post(service: ServiceProcess, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/predict", json=body, timeout=20)


def series(service: ServiceProcess) -> dict[str, list[dict[str, str]]]:
    """Each series' label sets, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{service.url}/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def test_models_beyond_the_limit_share_a_label(busy: ServiceProcess):
    found = series(busy)
    models = {labels["model"] for labels in found["graft_model_requests_total"]}
    assert len(models) == 3
    assert models < {*MODELS, "other"}
    assert "other" in models
    stages = {labels["stage"] for labels in found["graft_model_stage_seconds_count"]}
    assert stages == {"prepare", "queue", "trunk", "head"}
    routes = {labels["route"] for labels in found["graft_http_requests_total"]}
    assert all(route.startswith("/") or route == "other" for route in routes)
    assert SECRET not in str(found)


def test_counts_are_of_what_was_sent(busy: ServiceProcess):
    text = httpx.get(f"{busy.url}/metrics").text
    totals: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "outcome" in sample.labels:
                key = sample.name, sample.labels["outcome"]
                totals[key] = totals.get(key, 0) + sample.value
    assert totals["graft_model_rows_total", "ok"] == 2 * len(MODELS)
    assert totals["graft_model_rows_total", "error"] == len(MODELS)
    assert totals["graft_model_requests_total", "ok"] == len(MODELS)


def walk(node: Any) -> Iterator[Any]:
    yield node
    for name in ("expr", "lhs", "rhs", "vs", "vector_selector", "args", "param"):
        below = getattr(node, name, None)
        for each in below if isinstance(below, list) else [below]:
            if each is not None and not isinstance(each, str | float | int):
                yield from walk(each)


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_of_the_dashboard_finds_its_series(busy: ServiceProcess, query: str):
    found = series(busy)
    nodes = list(walk(promql.parse(query.replace("$__rate_interval", "5m"))))
    selectors = [node for node in nodes if isinstance(node, promql.VectorSelector)]
    grouped = {
        label
        for node in nodes
        if isinstance(node, promql.AggregateExpr) and node.modifier
        for label in node.modifier.labels
    }
    assert selectors
    for selector in selectors:
        assert selector.name in found, f"no series {selector.name}"
        matched = {matcher.name for matcher in selector.matchers.matchers} - {"__name__"}
        for labels in found[selector.name]:
            assert grouped | matched <= labels.keys()


def test_a_query_of_what_is_not_there_would_be_noticed(busy: ServiceProcess):
    for wrong in ("sum by (nobody) (graft_queued_rows)", "graft_nothing"):
        with pytest.raises(AssertionError):
            test_a_query_of_the_dashboard_finds_its_series(busy, wrong)


def test_the_log_has_a_line_for_each_request_and_no_input(busy: ServiceProcess):
    lines = [json.loads(line) for line in read(busy.log) if line.startswith('{"time":')]
    predictions = [line for line in lines if line["route"] == "/v1/predict"]
    assert len(predictions) == len(MODELS) + 2
    first = predictions[0]
    assert (first["status"], first["rows"]) == (200, 3)
    assert first["model"] in ("one@1", "one@2")
    assert first["failed_rows"] == 1
    assert first["timing_ms"].keys() == {"prepare", "queue", "trunk", "head", "total"}
    text = busy.log.read_text()
    assert SECRET not in text
    assert "Traceback" not in text


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()
