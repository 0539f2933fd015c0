"""``POST /v1/score`` and ``POST /v1/compare``: the body goes to the wire format, the request to the scorer, and back.

Bodies are read and written as bytes: the web framework never parses an item. A body of ``/v1/score`` that belongs to a
compatibility protocol, which its keys show, is answered in that protocol.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from reward_client.signatures import SIGNATURE_HEADER, signature_of
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api_keys import read_answer_key
from service.assembly import ServedModel
from service.errors import InvalidRequest
from service.http.answering import note_parsed, score_and_note
from service.http.body import read_json_body
from service.http.facts import facts_of, nonce_of, run_id_of
from service.http.protocols import foreign_routes_on
from service.protocols.native import RequestDefaults, parse_compare_request, parse_score_request
from service.protocols.native_answers import render_comparison, render_scores
from service.records import ScoreRequest

_Parse: TypeAlias = Callable[[bytes, RequestDefaults], ScoreRequest]
_Render: TypeAlias = Callable[..., bytes]

SCORE_PATH = "/v1/score"


def scoring_routes(served: ServedModel) -> list[Route]:
    """The native routes that compute rewards."""
    settings = served.settings
    stage_duration = served.metrics.stage_duration
    outputs = served.info.outputs
    defaults = RequestDefaults(
        settings.limits,
        settings.tokenization.truncation,
        settings.diagnostics.level,
        outputs,
        has_reward=served.rule.has_reward,
    )
    answer_key = read_answer_key(settings.security.answer_key)
    foreign_routes = foreign_routes_on(SCORE_PATH, served)

    async def answer(request: Request, body: bytes, parse: _Parse, render: _Render) -> Response:
        facts = facts_of(request)
        nonce = nonce_of(request)
        if nonce is not None and not answer_key:
            raise InvalidRequest("This service has no secret to sign answers with; security.answer_key names its file")
        score_request = replace(parse(body, defaults), run_id=run_id_of(request))
        parse_s = note_parsed(served, facts, len(score_request.items))
        scored, timings = await score_and_note(served, score_request, facts, parse_s)
        template = served.tokenization.template_for(score_request.encoding)
        begin = time.perf_counter()
        content = render(score_request, scored.outcomes, served.identity, template, scored.usage, timings, outputs)
        stage_duration.labels("serialize").observe(time.perf_counter() - begin)
        headers = {"X-Reward-Activation": "none"}
        if nonce is not None:
            headers[SIGNATURE_HEADER] = signature_of(answer_key, nonce, body, content)
        return Response(content, media_type="application/json", headers=headers)

    async def read(request: Request) -> bytes:
        return await read_json_body(request.headers, request.stream(), settings.limits, facts_of(request).body)

    async def score(request: Request) -> Response:
        body = await read(request)
        for foreign in foreign_routes:
            if foreign.recognises(body):
                return await foreign.answer(request, body)
        return await answer(request, body, parse_score_request, render_scores)

    async def compare(request: Request) -> Response:
        return await answer(request, await read(request), parse_compare_request, render_comparison)

    return [Route(SCORE_PATH, score, methods=["POST"]), Route("/v1/compare", compare, methods=["POST"])]
