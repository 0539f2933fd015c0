"""The HTTP side as a FastAPI application that needs no Ray: routes, headers, problems and one log line per request.

Everything that a body means is decided in ``protocols``, everything that a reward needs in the scorer; here is only
what HTTP asks for. Bodies are read and answered as bytes: pydantic never sees an item.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import msgspec
from fastapi import FastAPI, Request
from reward_client.provenance import check_reference
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.assembly import ServedModel
from service.diagnostics.item_state import Outcome
from service.diagnostics.monitors.monitor import MonitorView, describe_state
from service.errors import (
    ClientGone,
    Draining,
    HttpError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotReady,
    RouteNotFound,
    RunNotFound,
)
from service.http import openapi
from service.http.access_log import Journal
from service.http.body import read_json_body
from service.protocols.native import (
    MAX_NAME_CHARS,
    RequestDefaults,
    parse_compare_request,
    parse_score_request,
    render_comparison,
    render_scores,
)
from service.protocols.problem import MEDIA_TYPE, render_problem, retry_after_s
from service.records import ScoreRequest, Timings

Exposition: TypeAlias = Callable[[], Awaitable[str]]
"""Gathers the metrics of all replicas, in Prometheus' text format."""

MonitorGathering: TypeAlias = Callable[[str | None], Awaitable[MonitorView]]
"""Gathers what the monitors of all replicas know of everything, or of one run."""

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_Parse: TypeAlias = Callable[[bytes, RequestDefaults], ScoreRequest]
_Render: TypeAlias = Callable[..., bytes]


@dataclass(slots=True)
class RequestFacts:
    """What the log line and the headers say about one request; filled by whoever learns it."""

    request_id: str
    code: str | None = None
    items: int | None = None
    failed: int | None = None
    scored_tokens: int | None = None
    timings: Timings | None = None
    started_at: float = field(default_factory=time.perf_counter)


class OpenRequests:
    """The requests that have come and whose last byte has not gone; for an orderly end."""

    def __init__(self) -> None:
        self._num_open = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._num_open += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._none.set()

    async def wait_until_none(self, timeout_s: float) -> None:
        """Return once none is open, or after ``timeout_s`` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none.wait()


def create_routes(
    served: ServedModel,
    exposition: Exposition,
    journal: Journal,
    open_requests: OpenRequests,
    *,
    monitors: MonitorGathering | None = None,
    host_echoes_request_id: bool = False,
) -> FastAPI:
    """Build the application that answers for one replica.

    Args:
        served: the model and its scorer; started and stopped by the caller.
        exposition: what ``/metrics`` answers.
        journal: where request lines go; closed by the caller.
        open_requests: counts requests in and out.
        monitors: what ``/v1/monitor`` answers; None: this replica alone.
        host_echoes_request_id: whether what runs the application puts ``X-Request-Id`` on answers itself, as Ray does.
    """
    app = FastAPI(title="Reward service", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(HttpError, _on_refusal)
    app.add_exception_handler(HTTPException, _on_framework_refusal)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    _add_scoring_routes(app, served)
    _add_operating_routes(app, served, exposition)
    _add_monitor_route(app, served, monitors)
    app.add_middleware(
        Envelope,
        served=served,
        journal=journal,
        open_requests=open_requests,
        echoes_request_id=not host_echoes_request_id,
    )
    return app


def _add_scoring_routes(app: FastAPI, served: ServedModel) -> None:
    settings = served.settings
    stage_duration = served.metrics.stage_duration
    defaults = RequestDefaults(settings.limits, settings.tokenization.truncation, settings.diagnostics.level)

    async def answer(request: Request, parse: _Parse, render: _Render) -> Response:
        facts: RequestFacts = request.state.facts
        body = await read_json_body(request.headers, request.stream(), settings.limits.max_request_bytes)
        score_request = replace(parse(body, defaults), run_id=_run_id(request))
        parse_s = time.perf_counter() - facts.started_at
        stage_duration.labels("parse").observe(parse_s)
        facts.items = len(score_request.items)
        scored = await served.scorer.score(score_request)
        timings = _whole(scored.timings, parse_s, time.perf_counter() - facts.started_at)
        _note_answer(facts, scored.outcomes, scored.usage.scored_tokens, timings)
        template = served.tokenization.template_for(score_request.encoding)
        begin = time.perf_counter()
        content = render(score_request, scored.outcomes, served.identity, template, scored.usage, timings)
        stage_duration.labels("serialize").observe(time.perf_counter() - begin)
        return Response(content, media_type="application/json", headers={"X-Reward-Activation": "none"})

    async def score(request: Request) -> Response:
        return await answer(request, parse_score_request, render_scores)

    async def compare(request: Request) -> Response:
        return await answer(request, parse_compare_request, render_comparison)

    app.routes.append(_PlainRoute("/v1/score", score, methods=["POST"]))
    app.routes.append(_PlainRoute("/v1/compare", compare, methods=["POST"]))


class _PlainRoute(Route):
    """Starlette's route: it calls its function and no more, where FastAPI first solves dependencies, which are none."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Tell whether it takes the request, and name itself to what counts by routes, as FastAPI's routes do."""
        match, child_scope = super().matches(scope)
        return match, child_scope if match is Match.NONE else {**child_scope, "route": self}


def _add_operating_routes(app: FastAPI, served: ServedModel, exposition: Exposition) -> None:
    description = served.description()
    encoded_description = msgspec.json.encode(description)
    origin = served.origin
    schema = msgspec.json.encode(openapi.document())

    @app.get("/v1/model")
    async def model(request: Request) -> Response:
        asked = request.query_params.get("reference")
        if asked is None:
            return Response(encoded_description, media_type="application/json")
        if not 0 < len(asked) <= MAX_NAME_CHARS:
            raise InvalidRequest(f"The reference must have 1 to {MAX_NAME_CHARS} characters")
        told = description | {"reference": asdict(check_reference(origin, asked))}
        return Response(msgspec.json.encode(told), media_type="application/json")

    @app.get("/livez")
    async def live() -> Response:
        return Response(b'{"status":"alive"}', media_type="application/json")

    @app.get("/readyz")
    async def ready() -> Response:
        served.scorer.check_health()
        state = served.scorer.state
        if state == "draining":
            raise Draining("This replica takes no new requests")
        if state != "ready":
            raise NotReady("The model is loading or warming up")
        return Response(b'{"status":"ready"}', media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await exposition(), headers={"Content-Type": METRICS_MEDIA_TYPE})

    @app.get("/openapi.json")
    async def schemas() -> Response:
        return Response(schema, media_type="application/json")


def _add_monitor_route(app: FastAPI, served: ServedModel, gathering: MonitorGathering | None) -> None:
    async def own(run_id: str | None) -> MonitorView:
        return served.monitors.view(run_id)

    gather = gathering or own

    @app.get("/v1/monitor")
    async def monitor(request: Request) -> Response:
        run_id = _run_id(request)
        view = await gather(run_id)
        if view.state is None:
            raise RunNotFound(f"No items of this run are remembered; {len(view.runs)} other runs are")
        answer = {
            "model": {"name": served.identity.name, "version": served.identity.version},
            "run": run_id,
            "runs": view.runs,
            "incomplete": view.incomplete,
            "calibrated": served.monitors.reference is not None,
        }
        found = describe_state(view.state, served.monitors.reference, served.settings.monitors)
        return Response(msgspec.json.encode(answer | found), media_type="application/json")


def _run_id(request: Request) -> str | None:
    """The training run that the request belongs to.

    Raises:
        InvalidRequest: the header is there, but is no name that could be kept.
    """
    given = request.headers.get("X-Run-Id")
    if given is not None and not _REQUEST_ID.fullmatch(given):
        raise InvalidRequest("X-Run-Id must be 1 to 128 of A-Z a-z 0-9 _ . : -")
    return given


def _whole(timings: Timings, parse_s: float, total_s: float) -> Timings:
    """The scorer's timings with what only the HTTP side can measure."""
    return Timings(parse_s, timings.tokenize_s, timings.queue_s, timings.engine_s, total_s)


def _note_answer(facts: RequestFacts, outcomes: tuple[Outcome, ...], scored_tokens: int, timings: Timings) -> None:
    facts.failed = sum(isinstance(outcome, HttpError) for outcome in outcomes)
    facts.scored_tokens = scored_tokens
    facts.timings = timings


def _problem_response(error: HttpError, facts: RequestFacts) -> Response:
    facts.code = error.code
    wait_s = retry_after_s(error, random.random())  # noqa: S311 - spreads clients, hides nothing
    headers = {} if wait_s is None else {"Retry-After": str(wait_s)}
    return Response(render_problem(error, facts.request_id), error.status, headers, MEDIA_TYPE)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)  # noqa: S101 - Starlette looks handlers up by class
    return _problem_response(error, request.state.facts)


async def _on_framework_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    known: dict[int, HttpError] = {
        404: RouteNotFound("There is no such route here; /openapi.json lists them"),
        405: MethodNotAllowed(f"The route does not take {request.method}"),
    }
    response = _problem_response(known.get(error.status_code, InternalError()), request.state.facts)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, _: Exception) -> Response:
    return _problem_response(ClientGone("The client left before its request was whole"), request.state.facts)


class Envelope:
    """What every request gets whatever its route: an id, the headers that name us, a log line, and an answer.

    It stands outside the routes, so an exception that nobody expected ends here as a bland 500 whose details are in the
    log alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        served: ServedModel,
        journal: Journal,
        open_requests: OpenRequests,
        echoes_request_id: bool,
    ) -> None:
        self._app = app
        self._served = served
        self._journal = journal
        self._open_requests = open_requests
        self._echoes_request_id = echoes_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._open_requests:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        facts = RequestFacts(_request_id(scope))
        scope.setdefault("state", {})["facts"] = facts
        status: list[int] = []

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                self._add_headers(message, facts)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            facts.code = ClientGone.code
            status[:] = [ClientGone.status]
            raise
        except Exception as error:  # noqa: BLE001 - the last line: whatever a bug raised, the client gets an answer
            facts.code = InternalError.code
            self._journal.write_bug(error, request_id=facts.request_id)
            if not status:
                await _problem_response(InternalError(), facts)(scope, receive, send_with_headers)
        finally:
            self._finish(scope, facts, status[0] if status else InternalError.status)

    def _add_headers(self, message: MutableMapping[str, Any], facts: RequestFacts) -> None:
        headers = MutableHeaders(scope=message)
        if self._echoes_request_id:
            headers["X-Request-Id"] = facts.request_id
        headers["X-Model-Version"] = self._served.identity.version
        headers["Server-Timing"] = _server_timing(facts)

    def _finish(self, scope: Scope, facts: RequestFacts, status: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        total_s = time.perf_counter() - facts.started_at
        self._served.metrics.observe_request(route, facts.code or str(status), total_s)
        if route in _QUIET_ROUTES and status < 400:
            return
        stages = facts.timings.by_stage if facts.timings else {"total": total_s}
        self._journal.write(
            "scored" if facts.timings else "answered",
            request_id=facts.request_id,
            route=route,
            status=status,
            code=facts.code,
            model_version=self._served.identity.version,
            items=facts.items,
            failed=facts.failed,
            scored_tokens=facts.scored_tokens,
            **{f"{stage}_s": round(seconds, 6) for stage, seconds in stages.items()},
        )


_QUIET_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
"""Asked every few seconds by machines; only their failures are worth a line."""


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return uuid.uuid4().hex


def _server_timing(facts: RequestFacts) -> str:
    if facts.timings is None:
        return f"total;dur={(time.perf_counter() - facts.started_at) * 1000:.3f}"
    return ", ".join(f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in facts.timings.by_stage.items())
