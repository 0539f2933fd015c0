"""The remote reward model of slime and miles: ``POST /rm``, whose answer is the bare reward.

``/rm/dict`` and ``/rm?format=dict`` answer an object with flat numbers, for ``--reward-key reward``. miles does not
repeat a request, so requests wait for room in the queue.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from service.protocols.base import (
    Answer,
    Call,
    Protocol,
    ProtocolContext,
    Rendering,
    ScoringRoute,
    WireRequest,
    is_truncated,
    num_tokens,
    ood_p,
    reward_of,
)
from service.protocols.json_body import decode_body
from service.protocols.native import WireMessage, read_prompt
from service.protocols.violations import invalid
from service.records import Encoding, Exchange, Item

DEADLINE_S = 100.0
"""The client of slime gives up after 120 s, that of miles after 300 s."""


OUTPUT_PREFIX = "reward_"
"""Put in front of the name of each output of a model with several."""


class WireSampleRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /rm``: one prompt with its response."""

    prompt: str | list[WireMessage]
    response: str
    label: Any = None
    model: str | None = None


class _Sample(msgspec.Struct, frozen=True):
    """What the answer reports beside the Score."""

    as_object: bool
    concatenated: bool
    is_calibrated: bool
    outputs: tuple[str, ...]
    """Names of the model's outputs."""


_decoder = msgspec.json.Decoder(WireSampleRequest)

_OBJECT = {
    "type": "object",
    "required": ["reward"],
    "properties": {
        "reward": {"type": "number", "description": "A model with several outputs has reward_<name> beside it."},
        "length": {"type": "integer", "description": "Tokens of the response."},
        "tokens": {"type": "integer", "description": "Tokens that the model read."},
        "truncated": {"enum": [0, 1]},
        "concatenated": {"enum": [0, 1], "description": "1: the prompt was taken for templated already."},
        "ood_p": {"type": "number", "description": "Only where the model is calibrated; -1: not known."},
    },
    "additionalProperties": {"type": "number"},
}


def _decode(request: WireRequest, context: ProtocolContext) -> Call:
    form = request.query.get("format")
    if form not in {None, "dict", "number"}:
        raise invalid("", "out_of_range", "The query parameter format is dict or number")
    return _call(request, context, as_object=form == "dict")


def _decode_for_object(request: WireRequest, context: ProtocolContext) -> Call:
    return _call(request, context, as_object=True)


def _call(request: WireRequest, context: ProtocolContext, *, as_object: bool) -> Call:
    wire: WireSampleRequest = decode_body(_decoder, request.body)
    template = _template(wire.prompt, context)
    decided: Rendering | None = None
    if isinstance(wire.prompt, str):
        decided = "concat" if template == "concat" else "chat"
    return Call(
        (Item(Exchange(read_prompt(wire.prompt, "/prompt"), wire.response)),),
        context.truncating(Encoding(template=template)),
        context.level if as_object else "basic",
        wire.model,
        rendering=decided,
        wire=_Sample(as_object, template == "concat", context.is_calibrated, context.outputs),
    )


def _template(prompt: str | list[WireMessage], context: ProtocolContext) -> Literal["chat", "concat"] | None:
    if isinstance(prompt, list):
        return None
    setting = context.settings.slime_template
    if setting != "auto":
        return setting
    return "concat" if any(token in prompt for token in context.special_tokens) else None


def _encode(call: Call, answer: Answer) -> bytes:
    sample: _Sample = call.wire
    (score,) = answer.scores
    if not sample.as_object:
        return msgspec.json.encode(reward_of(score))
    members: dict[str, float] = {"reward": reward_of(score)}
    if score.outputs:
        members |= {f"{OUTPUT_PREFIX}{name}": value for name, value in zip(sample.outputs, score.outputs, strict=True)}
    length = score.length.completion_tokens if score.length else None
    if length is not None:
        members["length"] = length
    members |= {
        "tokens": num_tokens(score),
        "truncated": int(is_truncated(score)),
        "concatenated": int(sample.concatenated),
    }
    if sample.is_calibrated:
        members["ood_p"] = ood_p(score)
    return msgspec.json.encode(members)


PROTOCOL = Protocol(
    "slime",
    DEADLINE_S,
    (
        ScoringRoute(
            "/rm",
            "slime, miles: the reward of one response, as a bare number",
            _decode,
            _encode,
            WireSampleRequest,
            {"anyOf": [{"type": "number"}, _OBJECT], "description": "An object with ?format=dict."},
        ),
        ScoringRoute(
            "/rm/dict",
            "slime, miles: the reward of one response, in an object",
            _decode_for_object,
            _encode,
            WireSampleRequest,
            _OBJECT,
        ),
    ),
    waits_for_room=True,
)
