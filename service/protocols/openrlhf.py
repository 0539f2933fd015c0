"""OpenRLHF's remote reward model: ``POST /get_reward`` (versions 0.6 to 0.11).

``query`` is a whole text, decoded with special tokens in the actor's template, so it is tokenized as it is. The values
of ``extra_logs`` go into tensors of the trainer, so each key has a finite number for each item in every answer.
"""

from __future__ import annotations

from typing import Any

import msgspec

from service.protocols.base import (
    AS_IT_IS,
    UNKNOWN,
    Answer,
    Call,
    Protocol,
    ProtocolContext,
    ScoringRoute,
    WireRequest,
    is_truncated,
    num_tokens,
    ood_p,
    reward_of,
    sigmoid,
)
from service.protocols.json_body import decode_body
from service.records import Content, Exchange, Item, Score, TemplatedText

DEADLINE_S = 150.0
"""The client gives up after 180 s."""


OUTPUT_PREFIX = "rm_reward_"
"""Put in front of the name of each output of a model with several."""


class WireRewardRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /get_reward``."""

    query: list[str] | str
    prompts: Any = None
    """Prompts of the queries; used where they are as many strings and the queries begin with them."""
    labels: Any = None
    model: str | None = None


_decoder = msgspec.json.Decoder(WireRewardRequest)

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_ANSWER = {
    "type": "object",
    "required": ["rewards", "scores", "extra_logs"],
    "properties": {
        "rewards": _NUMBERS,
        "scores": {**_NUMBERS, "description": "The rewards, or their sigmoid if protocols.openrlhf_scores says so."},
        "extra_logs": {
            "type": "object",
            "description": f"One number per item under each name; {UNKNOWN:g}: not known.",
            "additionalProperties": _NUMBERS,
        },
    },
}


def _decode(request: WireRequest, context: ProtocolContext) -> Call:
    wire: WireRewardRequest = decode_body(_decoder, request.body)
    queries = [wire.query] if isinstance(wire.query, str) else wire.query
    context.check_count(len(queries))
    prompts = [wire.prompts] if isinstance(wire.prompts, str) else wire.prompts
    if not isinstance(prompts, list) or len(prompts) != len(queries):
        prompts = [None] * len(queries)
    items = tuple(Item(_content(*texts)) for texts in zip(queries, prompts, strict=True))
    return Call(items, context.truncating(AS_IT_IS), context.level, wire.model, wire=context)


def _content(query: str, prompt: object) -> Content:
    """The same text in either form: the split only tells the diagnostics where the completion begins.

    The client cuts long prompts, and its query then does not begin with the prompt: the split is unknown.
    """
    if isinstance(prompt, str) and prompt and query.startswith(prompt):
        return Exchange(prompt, query[len(prompt) :])
    return TemplatedText(query)


def _encode(call: Call, answer: Answer) -> bytes:
    context: ProtocolContext = call.wire
    rewards = [reward_of(score) for score in answer.scores]
    squashed = context.settings.openrlhf_scores == "sigmoid"
    logs = {
        "rm_tokens": [float(num_tokens(score)) for score in answer.scores],
        "rm_truncated": [float(is_truncated(score)) for score in answer.scores],
        "rm_completion_chars": [_completion_chars(score) for score in answer.scores],
    }
    if len(context.item_outputs) > 1:
        logs |= {
            f"{OUTPUT_PREFIX}{name}": [score.outputs[index] for score in answer.scores]
            for index, name in enumerate(context.item_outputs)
        }
    if context.is_calibrated:
        logs["rm_ood_p"] = [ood_p(score) for score in answer.scores]
    scores = [sigmoid(reward) for reward in rewards] if squashed else rewards
    return msgspec.json.encode({"rewards": rewards, "scores": scores, "extra_logs": logs})


def _completion_chars(score: Score) -> float:
    chars = score.length.completion_chars if score.length else None
    return UNKNOWN if chars is None else float(chars)


PROTOCOL = Protocol(
    "openrlhf",
    DEADLINE_S,
    (
        ScoringRoute(
            "/get_reward",
            "OpenRLHF: rewards of whole texts",
            _decode,
            _encode,
            WireRewardRequest,
            _ANSWER,
            allows_empty=True,
        ),
    ),
)
