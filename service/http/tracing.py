"""Traces of requests for OpenTelemetry: when they are made, and what they say. They never hold text of a user.

Nothing of OpenTelemetry is imported unless ``tracing.endpoint`` is set; ``http.spans`` makes and sends the spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from service.errors import SettingsError
from service.http.facts import RequestFacts, TraceParent
from service.records import Timings
from service.settings import TracingSettings

EXPORTER = "opentelemetry.exporter.otlp.proto.http"


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a request; times are seconds from the moment at which the service saw it."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class AnsweredRequest:
    """What a trace says of a request."""

    method: str
    route: str
    """The pattern of the path, never the path itself."""

    status: int
    facts: RequestFacts
    total_s: float
    """Seconds from the moment at which the service saw it to its last byte."""

    parent: TraceParent | None


class RequestTracer(Protocol):
    """Makes the spans of answered requests."""

    def record(self, request: AnsweredRequest) -> str | None:
        """Record a request; return the id of its trace, or None where it is not sampled."""
        ...

    def close(self) -> None:
        """Send what is recorded, for at most some seconds, and stop."""
        ...


def request_tracer(settings: TracingSettings, *, model: str, version: str, replica: str) -> RequestTracer | None:
    """Return a tracer; None where no endpoint is set.

    Args:
        settings: of tracing.
        model: name of the served model.
        version: of the served model.
        replica: name of this replica.

    Raises:
        SettingsError: an endpoint is set and the extra ``tracing`` is not installed.
    """
    if settings.endpoint is None:
        return None
    if not _is_installed(EXPORTER):
        raise SettingsError(
            "tracing.endpoint needs the extra tracing, which is not installed: in a clone of the repository "
            "pip install '.[tracing]'."
        )
    from service.http.spans import SpanTracer

    return SpanTracer(settings.endpoint, settings.sample_ratio, model=model, version=version, replica=replica)


def stages_of(timings: Timings | None, waited_s: float, total_s: float) -> Iterator[Stage]:
    """Yield the stages of a request in order, from the times that were measured of it.

    ``wait`` is what the request waited before the service saw it, ``read`` its body with the parsing, ``admission`` the
    wait for room in the queue; queue and forward pass are those of its slowest item. ``answer`` is all that follows:
    diagnostics, rendering, sending, and waits of the event loop.
    """
    if waited_s:
        yield Stage("wait", -waited_s, 0.0)
    if timings is None:
        return
    measured = (
        ("read", timings.parse_s),
        ("admission", timings.admission_s),
        ("tokenize", timings.tokenize_s),
        ("queue", timings.queue_s),
        ("forward", timings.engine_s),
    )
    begin_s = 0.0
    for name, seconds in measured:
        yield Stage(name, begin_s, begin_s + seconds)
        begin_s += seconds
    yield Stage("answer", begin_s, max(begin_s, total_s))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
