"""Makes the spans of requests and sends them by OTLP over HTTP; imported only where traces are wanted.

A request is recorded when it is answered, from the times that are measured anyway, so handling it costs nothing more.
Spans are sent by a thread of their own; those that its queue cannot hold are dropped.
"""

from __future__ import annotations

import threading
import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from service.http.facts import TraceParent
from service.http.tracing import AnsweredRequest, stages_of
from service.version import DISTRIBUTION, distribution_version

SEND_TIMEOUT_S = 5.0
"""Longest time for sending one batch of spans, attempts included."""
CLOSE_S = 2.0
"""Longest wait for the last spans when a replica stops."""
SERVER_ERROR = 500


class SpanTracer:
    """A `RequestTracer` of OpenTelemetry.

    Args:
        endpoint: address of an OTLP/HTTP receiver for traces.
        sample_ratio: share of the requests without a caller's span that are traced.
        model: name of the served model.
        version: of the served model.
        replica: name of this replica.
    """

    def __init__(self, endpoint: str, sample_ratio: float, *, model: str, version: str, replica: str) -> None:
        resource = Resource.create(
            {
                "service.name": DISTRIBUTION,
                "service.version": distribution_version(),
                "service.instance.id": replica,
                "reward.model.name": model,
                "reward.model.version": version,
            }
        )
        exporter = OTLPSpanExporter(endpoint, timeout=SEND_TIMEOUT_S)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(DISTRIBUTION, distribution_version())

    def record(self, request: AnsweredRequest) -> str | None:
        """Record a request; return the id of its trace, or None where it is not sampled."""
        end = time.time_ns()
        seen = end - _ns(request.total_s)
        facts = request.facts
        server = self._tracer.start_span(
            f"{request.method} {request.route}",
            _context_of(request.parent),
            SpanKind.SERVER,
            start_time=seen - _ns(facts.waited_s),
        )
        if not server.is_recording():
            return None
        attributes: dict[str, str | int | None] = {
            "http.request.method": request.method,
            "http.route": request.route,
            "http.response.status_code": request.status,
            "error.type": facts.code,
            "reward.request_id": facts.request_id,
            "reward.items": facts.items,
            "reward.failed_items": facts.failed,
            "reward.scored_tokens": facts.scored_tokens,
        }
        server.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if request.status >= SERVER_ERROR:
            server.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(server, Context())
        for stage in stages_of(facts.timings, facts.waited_s, request.total_s):
            span = self._tracer.start_span(stage.name, inside, start_time=seen + _ns(stage.begin_s))
            span.end(seen + _ns(stage.end_s))
        server.end(end)
        return f"{server.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Send what is recorded, for at most ``CLOSE_S`` seconds, and stop."""
        closing = threading.Thread(target=self._provider.shutdown, name="close-traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _context_of(parent: TraceParent | None) -> Context:
    """The context in which a request runs: in the span of its caller, if it has one."""
    if parent is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT)
    caller = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(caller), Context())


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
