"""Traces: a real OTLP receiver gets the spans of requests, in the caller's trace, and never text of a user."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from http_application import application
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service.errors import SettingsError
from service.http import spans, tracing
from service.http.tracing import request_tracer, stages_of
from service.records import Timings
from service.settings import TracingSettings

CANARY = "canary-of-a-user"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"items": [{"prompt": CANARY, "completion": CANARY, "id": CANARY}, {"text": CANARY}]}


class Receiver:
    """What an OTLP receiver has got."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                receiver.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    @property
    def spans(self) -> list[object]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


def attributes_of(span: object) -> dict[str, object]:
    return {
        entry.key: getattr(entry.value, str(entry.value.WhichOneof("value")))
        for entry in span.attributes  # type: ignore[attr-defined]
    }


async def test_spans_of_a_request_arrive(tmp_path: Path, receiver: Receiver) -> None:
    """A scored request is a span of the caller's trace with a span for each stage, in order and within it."""
    async with application(tmp_path, tracing={"endpoint": receiver.endpoint}) as app:
        parent = f"00-{TRACE_ID}-{SPAN_ID}-01"
        answer = await app.post("/v1/score", BODY, traceparent=parent, **{"X-Request-Id": "mine"})
        assert answer.status_code == 200
        identity = app.served.identity

    received = receiver.spans
    assert {span.trace_id.hex() for span in received} == {TRACE_ID}  # type: ignore[attr-defined]
    (server,) = [span for span in received if span.parent_span_id.hex() == SPAN_ID]  # type: ignore[attr-defined]
    stages = [span for span in received if span.parent_span_id == server.span_id]  # type: ignore[attr-defined]
    assert len(received) == 1 + len(stages)
    assert server.name == "POST /v1/score"  # type: ignore[attr-defined]
    attributes = attributes_of(server)
    assert attributes.pop("reward.scored_tokens") == len(CANARY) * 3
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/score",
        "http.response.status_code": 200,
        "reward.request_id": "mine",
        "reward.items": 2,
        "reward.failed_items": 0,
    }
    times = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in stages]  # type: ignore[attr-defined]
    in_order = sorted(stages, key=lambda span: span.start_time_unix_nano)  # type: ignore[attr-defined]
    assert {"read", "tokenize", "queue", "forward", "answer"} <= {span.name for span in in_order}  # type: ignore[attr-defined]
    assert all(begin <= end for begin, end in times)
    assert min(begin for begin, _ in times) >= server.start_time_unix_nano  # type: ignore[attr-defined]
    assert max(end for _, end in times) <= server.end_time_unix_nano + 1000  # type: ignore[attr-defined]
    resource = attributes_of(receiver.requests[0].resource_spans[0].resource)
    assert resource["service.name"] == "reward-service"
    assert (resource["reward.model.name"], resource["reward.model.version"]) == (identity.name, identity.version)


async def test_traces_hold_no_text_of_users(tmp_path: Path, receiver: Receiver) -> None:
    """Good and bad bodies, paths, queries and headers with a canary: none of the bytes that are sent has it."""
    async with application(tmp_path, tracing={"endpoint": receiver.endpoint}) as app:
        for body in (BODY, {CANARY: CANARY}, CANARY, {"items": [{"text": CANARY, CANARY: 1}]}, b"{" + CANARY.encode()):
            for route in ("/v1/score", "/v1/compare", "/classify", f"/{CANARY}", f"/v1/score?a={CANARY}"):
                await app.post(route, body, **{"X-Run-Id": CANARY, "traceparent": CANARY, "Cookie": CANARY})
    assert len(receiver.spans) >= 25
    assert not any(CANARY.encode() in body for body in receiver.bodies)
    codes = {attributes_of(span).get("error.type") for span in receiver.spans}
    assert {"not_found", "invalid_request", "malformed_body"} <= codes


async def test_what_is_sampled(tmp_path: Path, receiver: Receiver) -> None:
    """A request follows its caller's flag; without a caller the ratio decides; probes are not traced; logs have ids."""
    unsampled, sampled = "1" * 32, "2" * 32
    async with application(tmp_path, tracing={"endpoint": receiver.endpoint, "sample_ratio": 0.0}) as app:
        await app.post("/v1/score", BODY, traceparent=f"00-{unsampled}-{SPAN_ID}-00")
        await app.post("/v1/score", BODY, traceparent=f"00-{sampled}-{SPAN_ID}-01")
        await app.post("/v1/score", BODY)
    async with application(tmp_path, tracing={"endpoint": receiver.endpoint}) as app:
        await app.client.get("/livez")
        await app.post("/v1/score", BODY)
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    logged = [line.get("trace_id") for line in lines]
    assert logged[:3] == [unsampled, sampled, None]
    assert {span.trace_id.hex() for span in receiver.spans} == {sampled, logged[3]}  # type: ignore[attr-defined]


async def test_a_receiver_that_is_gone_delays_nothing(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a receiver requests are answered, and the end of the service hardly waits for it."""
    monkeypatch.setattr(spans, "CLOSE_S", 0.2)
    endpoint = receiver.endpoint
    receiver.close()
    async with application(tmp_path, tracing={"endpoint": endpoint}) as app:
        assert (await app.post("/v1/score", BODY)).status_code == 200
        stopping = time.perf_counter()
    assert time.perf_counter() - stopping < 5.0


def test_stages_follow_each_other() -> None:
    """The stages fill the time from the arrival to the answer without gaps."""
    timings = Timings(0.1, 0.2, 0.3, 0.4, 1.6, admission_s=0.5)
    stages = list(stages_of(timings, 0.7, 1.7))
    assert [stage.name for stage in stages] == ["wait", "read", "admission", "tokenize", "queue", "forward", "answer"]
    assert [stages[0].begin_s, *(stage.end_s for stage in stages)] == pytest.approx(
        [-0.7, 0, 0.1, 0.6, 0.8, 1.1, 1.5, 1.7]
    )
    assert all(earlier.end_s == later.begin_s for earlier, later in pairwise(stages))
    assert list(stages_of(None, 0.0, 1.0)) == []


def test_nothing_is_loaded_without_an_endpoint() -> None:
    """Without tracing no module of OpenTelemetry is imported, and there is no tracer."""
    assert request_tracer(TracingSettings(), model="m", version="v", replica="r") is None
    code = (
        "import sys, service.http.middleware; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_a_missing_extra_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an endpoint and without the exporter the start ends with a sentence that names the extra."""
    for missing in ("opentelemetry.exporter.nothing", "nothing.at.all"):
        monkeypatch.setattr(tracing, "EXPORTER", missing)
        with pytest.raises(SettingsError, match=r"\[tracing\]"):
            request_tracer(TracingSettings(endpoint="http://127.0.0.1:1"), model="m", version="v", replica="r")
