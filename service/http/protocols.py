"""The routes of the compatibility protocols, made from what ``service.protocols`` says about each."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.assembly import ServedModel
from service.checkpoints.reward_description import Probability
from service.errors import HttpError
from service.http.answering import note_parsed, score_and_note
from service.http.body import read_json_body
from service.http.facts import facts_of, run_id_of
from service.http.problems import problem_headers
from service.protocols.base import (
    Answer,
    Call,
    Protocol,
    ProtocolContext,
    ReadingRoute,
    ScoringRoute,
    WireRequest,
    score_request,
    scores_of,
)
from service.protocols.registry import enabled_protocols
from service.records import Score, Usage

JSON = "application/json"

_Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
_BodyEndpoint: TypeAlias = Callable[[Request, bytes], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class ForeignRoute:
    """A route of a protocol on a path of the native format."""

    recognises: Callable[[bytes], bool]
    """Whether a body is of the protocol."""
    answer: _BodyEndpoint
    """Answers such a body."""


def protocol_routes(served: ServedModel) -> list[Route]:
    """The routes of all enabled protocols, except for those on paths of the native format."""
    context = context_of(served)
    routes: list[Route] = []
    for protocol in enabled_protocols(served.settings.protocols):
        for scoring in protocol.scoring:
            if scoring.recognises is None:
                endpoint = _scoring_endpoint(served, protocol, scoring, context)
                routes += [Route(path, endpoint, methods=["POST"]) for path in (scoring.path, *scoring.aliases)]
        routes += [
            Route(reading.path, _reading_endpoint(served, protocol, reading, context)) for reading in protocol.reading
        ]
    return routes


def foreign_routes_on(path: str, served: ServedModel) -> list[ForeignRoute]:
    """The routes of enabled protocols on a path of the native format."""
    context = context_of(served)
    return [
        ForeignRoute(scoring.recognises, _body_endpoint(served, protocol, scoring, context))
        for protocol in enabled_protocols(served.settings.protocols)
        for scoring in protocol.scoring
        if scoring.path == path and scoring.recognises is not None
    ]


def context_of(served: ServedModel) -> ProtocolContext:
    """Return the facts about the served model that protocols need."""
    settings = served.settings
    return ProtocolContext(
        model=served.identity,
        max_input_tokens=served.info.max_input_tokens,
        limits=settings.limits,
        truncation=settings.protocols.truncation or settings.tokenization.truncation,
        is_calibrated=served.lookup.calibration is not None,
        special_tokens=served.tokenization.special_tokens,
        settings=settings.protocols,
        unadded_bos=served.tokenization.unadded_bos,
        outputs=served.info.outputs,
        has_reward=served.rule.has_reward,
        reads_markers=served.tokenization.reads_markers,
        gives_probabilities=isinstance(served.rule.combine, Probability) and len(served.info.outputs) > 1,
    )


def _scoring_endpoint(
    served: ServedModel, protocol: Protocol, route: ScoringRoute, context: ProtocolContext
) -> _Endpoint:
    answer_body = _body_endpoint(served, protocol, route, context)

    async def endpoint(request: Request) -> Response:
        try:
            body = await read_json_body(
                request.headers,
                request.stream(),
                context.limits,
                facts_of(request).body,
                any_media_type=protocol.takes_any_media_type,
            )
        except HttpError as error:
            return _error_response(protocol, error, request)
        return await answer_body(request, body)

    return endpoint


def _body_endpoint(
    served: ServedModel, protocol: Protocol, route: ScoringRoute, context: ProtocolContext
) -> _BodyEndpoint:
    async def answer_body(request: Request, body: bytes) -> Response:
        try:
            call = route.decode(_wire_request(request, body), context)
            answer = await _answer(served, protocol, route, context, call, request)
            begin = time.perf_counter()
            content = route.encode(call, answer)
        except HttpError as error:
            return _error_response(protocol, error, request)
        served.metrics.stage_duration.labels("serialize").observe(time.perf_counter() - begin)
        return Response(content, media_type=JSON, headers={"X-Reward-Activation": call.activation})

    return answer_body


async def _answer(
    served: ServedModel,
    protocol: Protocol,
    route: ScoringRoute,
    context: ProtocolContext,
    call: Call,
    request: Request,
) -> Answer:
    facts = facts_of(request)
    score = replace(score_request(call, protocol, context, route), run_id=run_id_of(request))
    parse_s = note_parsed(served, facts, len(call.items))
    if call.rendering is not None:
        served.metrics.slime_prompts.labels(rendering=call.rendering).inc()
    scores: tuple[Score, ...] = ()
    usage = Usage()
    if call.items:
        scored, _ = await score_and_note(served, score, facts, parse_s)
        scores, usage = scores_of(call, scored.outcomes), scored.usage
    return Answer(scores, usage, served.identity, facts.request_id, int(time.time()))


def _reading_endpoint(
    served: ServedModel, protocol: Protocol, route: ReadingRoute, context: ProtocolContext
) -> _Endpoint:
    async def endpoint(request: Request) -> Response:
        try:
            if route.needs_ready:
                served.scorer.refuse_unless_ready()
            return Response(route.encode(_wire_request(request), context), media_type=JSON)
        except HttpError as error:
            return _error_response(protocol, error, request)

    return endpoint


def _wire_request(request: Request, body: bytes = b"") -> WireRequest:
    return WireRequest(body, request.path_params, request.query_params, request.headers)


def _error_response(protocol: Protocol, error: HttpError, request: Request) -> Response:
    facts = facts_of(request)
    content = protocol.encode_error(error, facts.request_id)
    return Response(content, error.status, problem_headers(error, facts), JSON)
