"""What every request gets on any route: a request id, the model's headers, an access log line, and an answer.

A slash at the end of the path is ignored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ClientGone, InternalError
from service.http.access_log import AccessLog
from service.http.body_budget import BodyAccount, BodyBudget
from service.http.facts import RequestFacts, request_id_of, trace_parent_of
from service.http.loop_load import LoopLoad
from service.http.open_requests import OpenRequests
from service.http.problems import problem_response
from service.http.tracing import AnsweredRequest, RequestTracer
from service.http.unread_refusals import OTHER, UnreadRefusals
from service.metrics import Metrics

QUIET_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
"""Requested every few seconds by machines; only their failures are logged."""


class RequestMiddleware:
    """ASGI middleware outside the routes: an exception that no route expected ends here as a 500 without details.

    ``model_version``, ``body_budget`` and ``refusals`` are None while no model is loaded.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        model_version: str | None,
        metrics: Metrics,
        access_log: AccessLog,
        open_requests: OpenRequests,
        path_of: Mapping[Any, str],
        echoes_request_id: bool,
        body_budget: BodyBudget | None = None,
        refusals: UnreadRefusals | None = None,
        tracer: RequestTracer | None = None,
    ) -> None:
        self._app = app
        self._model_version = model_version
        self._metrics = metrics
        self._access_log = access_log
        self._open_requests = open_requests
        self._path_of = path_of
        self._echoes_request_id = echoes_request_id
        self._body_budget = body_budget
        self._refusals = refusals
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A path means the same with a slash at its end; a redirect would lose the body of a POST in many clients.
        # The path of the application itself has one behind its prefix, as its route has.
        bare = scope["path"].rstrip("/")
        scope["path"] = f"{bare}/" if bare == scope.get("root_path", "").rstrip("/") else bare
        if self._refusals is not None and scope["method"] == "POST" and (refusal := self._refusals.refusal()):
            await self._refusals.answer(refusal, scope, send)
            return
        with self._open_requests:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = None if self._body_budget is None else BodyAccount(self._body_budget)
        load = None if self._refusals is None else self._refusals.load
        facts = RequestFacts(request_id_of(scope), body=body, load=load)
        if load is not None:
            load.begin()
            facts.waited_s = load.waited_s
            receive = _counted(receive, load)
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
        except Exception as error:  # noqa: BLE001 - the last handler: the client gets an answer whatever a bug raised
            facts.code = InternalError.code
            self._access_log.write_exception(error, request_id=facts.request_id)
            if not status:
                await problem_response(InternalError(), facts)(scope, receive, send_with_headers)
        finally:
            if body is not None:
                body.release()
            if load is not None:
                load.finish()
            self._finish(scope, facts, status[0] if status else InternalError.status)

    def _add_headers(self, message: Message, facts: RequestFacts) -> None:
        headers = MutableHeaders(scope=message)
        if self._echoes_request_id:
            headers["X-Request-Id"] = facts.request_id
        if self._model_version is not None:
            headers["X-Model-Version"] = self._model_version
        headers["Server-Timing"] = _server_timing(facts)

    def _finish(self, scope: Scope, facts: RequestFacts, status: int) -> None:
        route = self._path_of.get(scope.get("endpoint"), OTHER)
        total_s = time.perf_counter() - facts.started_at
        self._metrics.observe_request(route, facts.code or str(status), total_s)
        if route in QUIET_ROUTES and status < 400:
            return
        parent = trace_parent_of(scope)
        trace_id = None if parent is None else parent.trace_id
        if self._tracer is not None:
            answered = AnsweredRequest(scope["method"], route, status, facts, total_s, parent)
            trace_id = self._tracer.record(answered) or trace_id
        stages = facts.timings.by_stage if facts.timings else {"total": total_s}
        self._access_log.write(
            "scored" if facts.timings else "answered",
            request_id=facts.request_id,
            trace_id=trace_id,
            route=route,
            status=status,
            code=facts.code,
            key=facts.key,
            model_version=self._model_version,
            items=facts.items,
            failed=facts.failed,
            scored_tokens=facts.scored_tokens,
            **{f"{stage}_s": round(seconds, 6) for stage, seconds in stages.items()},
        )


def _counted(receive: Receive, load: LoopLoad) -> Receive:
    """Receive messages, and count the request while it waits for one: the event loop has nothing to do for it."""

    async def receive_counted() -> Message:
        load.num_receiving += 1
        try:
            return await receive()
        finally:
            load.num_receiving -= 1

    return receive_counted


def _server_timing(facts: RequestFacts) -> str:
    if facts.timings is None:
        return f"total;dur={(time.perf_counter() - facts.started_at) * 1000:.3f}"
    return ", ".join(f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in facts.timings.by_stage.items())
