"""The request log and the traces: what they say, and what they must never say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from queue import Queue
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from core.settings import Settings
from service.observation import RequestRecord, Timing
from service.request_log import RequestLog
from service.tracing import Tracing

ANSWERED = RequestRecord(
    "r-1", "POST", "/v1/predict", 200, "pets@1", 2, 1,
    Timing(prepare=0.001, queue=0.002, trunk=0.003, head=0.004, total=0.01),
)  # fmt: skip


def lines(fraction: float, record: RequestRecord, times: int = 1) -> list[dict[str, Any]]:
    stream = io.StringIO()
    log = RequestLog(fraction, stream)
    for _ in range(times):
        log.write(record, 0.02)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_who_answered_and_where_the_time_went():
    (line,) = lines(1, ANSWERED)
    assert line.pop("time") > 0
    assert line == {
        "request_id": "r-1", "method": "POST", "route": "/v1/predict", "status": 200, "ms": 20.0,
        "model": "pets@1", "rows": 2, "failed_rows": 1,
        "timing_ms": {"prepare": 1.0, "queue": 2.0, "trunk": 3.0, "head": 4.0, "total": 10.0},
    }  # fmt: skip


def test_a_sample_is_one_and_failures_are_all_there():
    assert 0 < len(lines(0.5, ANSWERED, 200)) < 200
    assert len(lines(1e-9, RequestRecord("r-2", status=503), 50)) == 50
    assert lines(0, RequestRecord("r-2", status=503), 50) == []


@pytest.fixture
def collector() -> Iterator[tuple[str, Queue[ExportTraceServiceRequest]]]:
    """A collector of the OTLP protocol over HTTP."""
    received: Queue[ExportTraceServiceRequest] = Queue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            received.put(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    server.server_close()


def test_a_request_becomes_a_span_with_its_stages(
    collector: tuple[str, Queue[ExportTraceServiceRequest]],
):
    endpoint, received = collector
    tracing = Tracing.open(Settings(trace_endpoint=endpoint))
    assert tracing is not None
    timing = ANSWERED.timing
    assert timing is not None
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    tracing.record(ANSWERED, f"00-{trace_id}-b7ad6b7169203331-01", timing.began - 0.005)
    unsampled = f"00-{trace_id}-b7ad6b7169203331-00"
    tracing.record(ANSWERED, unsampled, timing.began)
    tracing.record(RequestRecord("r-3", status=500), "nonsense", timing.began)
    tracing.close()
    spans = [
        span
        for _ in range(received.qsize())
        for resource in received.get(timeout=10).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    by_name = {span.name: span for span in spans}
    assert by_name.keys() == {
        "POST /v1/predict", "prepare", "queue", "trunk", "head", "other other",
    }  # fmt: skip
    request = by_name["POST /v1/predict"]
    assert request.trace_id.hex() == trace_id
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    end = request.start_time_unix_nano
    for stage, seconds in timing.stages():
        child = by_name[stage]
        assert child.parent_span_id == request.span_id
        assert child.end_time_unix_nano - child.start_time_unix_nano == pytest.approx(
            seconds * 1e9, rel=1e-3
        )
        assert child.start_time_unix_nano >= end
        end = child.end_time_unix_nano
    assert by_name["other other"].trace_id.hex() != trace_id


def test_without_a_collector_nothing_is_traced():
    assert Tracing.open(Settings(trace_endpoint=None)) is None
