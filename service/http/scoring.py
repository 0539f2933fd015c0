"""``POST /v1/score`` and ``POST /v1/compare``: the body goes to the wire format, the request to the scorer, and back.

Bodies are read and written as bytes: the web framework never parses an item.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.assembly import ServedModel
from service.diagnostics.item_state import Outcome
from service.errors import HttpError
from service.http.body import read_json_body
from service.http.facts import RequestFacts, facts_of, run_id_of
from service.protocols.native import (
    RequestDefaults,
    parse_compare_request,
    parse_score_request,
    render_comparison,
    render_scores,
)
from service.records import ScoreRequest, Timings

_Parse: TypeAlias = Callable[[bytes, RequestDefaults], ScoreRequest]
_Render: TypeAlias = Callable[..., bytes]


def scoring_routes(served: ServedModel) -> list[Route]:
    """The routes that compute rewards."""
    settings = served.settings
    stage_duration = served.metrics.stage_duration
    defaults = RequestDefaults(settings.limits, settings.tokenization.truncation, settings.diagnostics.level)

    async def answer(request: Request, parse: _Parse, render: _Render) -> Response:
        facts = facts_of(request)
        body = await read_json_body(request.headers, request.stream(), settings.limits.max_request_bytes)
        score_request = replace(parse(body, defaults), run_id=run_id_of(request))
        parse_s = time.perf_counter() - facts.started_at
        stage_duration.labels("parse").observe(parse_s)
        facts.items = len(score_request.items)
        scored = await served.scorer.score(score_request)
        timings = _with_http_stages(scored.timings, parse_s, time.perf_counter() - facts.started_at)
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

    return [Route("/v1/score", score, methods=["POST"]), Route("/v1/compare", compare, methods=["POST"])]


def _with_http_stages(timings: Timings, parse_s: float, total_s: float) -> Timings:
    """The scorer's timings, completed by the stages that only the HTTP side can measure."""
    return Timings(parse_s, timings.tokenize_s, timings.queue_s, timings.engine_s, total_s)


def _note_answer(facts: RequestFacts, outcomes: tuple[Outcome, ...], scored_tokens: int, timings: Timings) -> None:
    facts.failed = sum(isinstance(outcome, HttpError) for outcome in outcomes)
    facts.scored_tokens = scored_tokens
    facts.timings = timings
