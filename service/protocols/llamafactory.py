"""LLaMA-Factory's reward server: ``POST /v1/score/evaluation``.

``messages`` are whole texts, decoded with special tokens, so they are tokenized as they are. The client neither repeats
a request nor looks at the status, so its requests wait for room in the queue.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from service.protocols.base import (
    AS_IT_IS,
    Answer,
    Call,
    Protocol,
    ProtocolContext,
    ScoringRoute,
    WireRequest,
    reward_of,
)
from service.protocols.json_body import decode_body
from service.records import Item, TemplatedText

DEADLINE_S = 120.0
"""The client would wait without end."""


class WireEvaluationRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /v1/score/evaluation``."""

    messages: list[str]
    model: str | None = None
    max_length: Annotated[int, Meta(ge=1)] | None = None


_decoder = msgspec.json.Decoder(WireEvaluationRequest)

_ANSWER = {
    "type": "object",
    "required": ["id", "object", "model", "scores"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "score.evaluation"},
        "model": {"type": "string"},
        "scores": {"type": "array", "items": {"type": "number"}, "description": "Rewards, in input order."},
    },
}


def _decode(request: WireRequest, context: ProtocolContext) -> Call:
    wire: WireEvaluationRequest = decode_body(_decoder, request.body)
    context.check_count(len(wire.messages))
    items = tuple(Item(TemplatedText(text)) for text in wire.messages)
    return Call(items, context.truncating(AS_IT_IS), model=wire.model, max_tokens=wire.max_length)


def _encode(_: Call, answer: Answer) -> bytes:
    return msgspec.json.encode(
        {
            "id": f"scoreval-{answer.request_id}",
            "object": "score.evaluation",
            "model": answer.model.name,
            "scores": [reward_of(score) for score in answer.scores],
        }
    )


PROTOCOL = Protocol(
    "llamafactory",
    DEADLINE_S,
    (
        ScoringRoute(
            "/v1/score/evaluation",
            "LLaMA-Factory: rewards of whole texts",
            _decode,
            _encode,
            WireEvaluationRequest,
            _ANSWER,
        ),
    ),
    waits_for_room=True,
)
