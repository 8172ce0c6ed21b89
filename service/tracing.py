"""OpenTelemetry traces, for who asks for them: a span for each request, and one for each stage.

Spans are made when the request has been answered, from the times that its record holds, so a
request pays nothing for them while it runs, and nothing is imported while they are off. They leave
by a thread of their own, from a bounded queue that drops when the collector is slow. A caller's
`traceparent` is continued, and its decision to sample followed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from core import __version__
from core.settings import Settings
from service.observation import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVER_ERROR = 500


class Tracing:
    """Makes spans of request records."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("graft")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def open(cls, settings: Settings) -> Tracing | None:
        """Return what sends spans to the collector of the settings, or None without one."""
        if settings.trace_endpoint is None:
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError:
            raise RuntimeError("GRAFT_TRACE_ENDPOINT needs: pip install 'graft[tracing]'") from None
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.trace_fraction)),
            resource=Resource.create({"service.name": "graft", "service.version": __version__}),
        )
        exporter = OTLPSpanExporter(endpoint=settings.trace_endpoint, timeout=5)
        provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=2048))
        return cls(provider)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def record(self, record: RequestRecord, traceparent: str | None, began: float) -> None:
        """Make the spans of a request that has just been answered; `began` is monotonic."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        now = time.time_ns()
        # From the monotonic clock, by which stages are measured, to the time of day.
        offset = now - int(time.monotonic() * 1e9)
        carrier = {"traceparent": traceparent} if traceparent else {}
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=offset + int(began * 1e9),
            attributes={
                "http.request.method": record.method,
                "http.route": record.route,
                "http.response.status_code": record.status,
                "graft.request_id": record.request_id,
            },
        )
        if record.timing is not None:
            span.set_attribute("graft.model", record.model or "")
            span.set_attribute("graft.rows", record.rows)
            context = set_span_in_context(span)
            begin = offset + int(record.timing.began * 1e9)
            for stage, seconds in record.timing.stages():
                end = begin + int(seconds * 1e9)
                child = self._tracer.start_span(stage, context=context, start_time=begin)
                child.end(end)
                begin = end
        if record.status >= SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)
