"""The pooling routes of vLLM: ``/classify``, ``/pooling`` and ``/score``; verl reads the first.

Rewards are raw. vLLM itself answers a sigmoid unless ``use_activation`` is false.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from service.protocols.base import (
    Answer,
    Call,
    Protocol,
    ProtocolContext,
    ScoringRoute,
    WireRequest,
    activation_for,
)
from service.protocols.inputs import (
    ACTIVATION_FLAGS,
    WirePoolingOptions,
    WirePoolingRequest,
    item_members,
    numbers,
    pooling_call,
    rows,
    truncation_of,
    usage_members,
    vectors,
)
from service.protocols.json_body import decode_body
from service.protocols.violations import invalid
from service.records import Exchange, Item

DEADLINE_S = 120.0
"""The client of verl would wait without end."""


class WirePairsRequest(WirePoolingOptions, kw_only=True):
    """The body of ``POST /score``: prompts (``text_1``, ``queries``) and completions (``text_2``, ``documents``)."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    model: str | None = None


_pooling_decoder = msgspec.json.Decoder(WirePoolingRequest)
_pairs_decoder = msgspec.json.Decoder(WirePairsRequest)


class _Keys(msgspec.Struct):
    """The members of a body that the native route does not have."""

    text_1: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    queries: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_keys_decoder = msgspec.json.Decoder(_Keys)


def _decode_input(request: WireRequest, context: ProtocolContext) -> Call:
    return pooling_call(decode_body(_pooling_decoder, request.body), context)


def _decode_pairs(request: WireRequest, context: ProtocolContext) -> Call:
    wire: WirePairsRequest = decode_body(_pairs_decoder, request.body)
    encoding, max_tokens = truncation_of(wire, context)
    flags = {name: getattr(wire, name) for name in ACTIVATION_FLAGS}
    prompts = _texts(wire, "text_1", "queries")
    completions = _texts(wire, "text_2", "documents")
    context.check_count(len(completions))
    if len(prompts) == 1:
        prompts *= len(completions)
    if len(prompts) != len(completions):
        raise invalid("", "lengths_differ", f"There are {len(prompts)} prompts for {len(completions)} completions")
    return Call(
        tuple(Item(Exchange(*texts)) for texts in zip(prompts, completions, strict=True)),
        encoding,
        model=wire.model,
        max_tokens=max_tokens,
        activation=activation_for(flags, context.settings),
    )


def _texts(wire: WirePairsRequest, name: str, other: str) -> list[str]:
    given = [value for value in (getattr(wire, name), getattr(wire, other)) if value is not None]
    if len(given) != 1:
        raise invalid("", "not_one_form", f"A request has either {name} or {other}")
    return [given[0]] if isinstance(given[0], str) else given[0]


def _recognises_pairs(body: bytes) -> bool:
    if b'"text_1"' not in body and b'"queries"' not in body:
        return False
    try:
        keys = _keys_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return keys.text_1 is not msgspec.UNSET or keys.queries is not msgspec.UNSET


def _encode_classes(call: Call, answer: Answer) -> bytes:
    entries = [{"label": None, "probs": row, "num_classes": len(row)} for row in rows(call, answer)]
    return _list("classify", call, answer, entries)


def _encode_vectors(call: Call, answer: Answer) -> bytes:
    wire: WirePoolingRequest = call.wire
    entries = [{"object": "pooling", "data": vector} for vector in vectors(call, answer, wire.encoding_format)]
    return _list("pool", call, answer, entries)


def _encode_scores(call: Call, answer: Answer) -> bytes:
    return _list("score", call, answer, [{"object": "score", "score": number} for number in numbers(call, answer)])


def _list(prefix: str, call: Call, answer: Answer, entries: list[dict[str, Any]]) -> bytes:
    data = [
        {"index": index, **entry, **item_members(call, index, score)}
        for index, (entry, score) in enumerate(zip(entries, answer.scores, strict=True))
    ]
    return msgspec.json.encode(
        {
            "id": f"{prefix}-{answer.request_id}",
            "object": "list",
            "created": answer.created_s,
            "model": answer.model.name,
            "data": data,
            "usage": usage_members(answer),
        }
    )


def list_schema(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an answer whose ``data`` has such entries."""
    properties = {
        "index": {"type": "integer"},
        **entry,
        "tokens": {"type": "integer"},
        "truncated": {"type": "boolean"},
        "bos_added": {
            "const": True,
            "description": "Present where the route added the BOS that the client had cut from a conversation.",
        },
    }
    return {
        "type": "object",
        "required": ["object", "model", "data", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "list"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "data": {"type": "array", "items": {"type": "object", "properties": properties}},
            "usage": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
    }


VECTOR = {
    "description": "The reward alone, or all outputs of a model with several; a string with encoding_format base64.",
    "type": ["array", "string"],
}
"""JSON schema of the vector of an item."""

_CLASSES = {
    "label": {"type": "null"},
    "probs": {"type": "array", "items": {"type": "number"}, "description": "The reward, or all outputs; raw."},
    "num_classes": {"type": "integer", "description": "Outputs of the model."},
}


def _pairs_route(path: str, recognises: Callable[[bytes], bool] | None = None) -> ScoringRoute:
    schema = list_schema({"object": {"const": "score"}, "score": {"type": "number"}})
    summary = "vLLM: rewards of prompts with completions"
    return ScoringRoute(path, summary, _decode_pairs, _encode_scores, WirePairsRequest, schema, recognises=recognises)


PROTOCOL = Protocol(
    "vllm",
    DEADLINE_S,
    (
        ScoringRoute(
            "/classify",
            "vLLM, verl: rewards of texts, token ids or one conversation",
            _decode_input,
            _encode_classes,
            WirePoolingRequest,
            list_schema(_CLASSES),
            aliases=("/v1/classify",),
            answers_vectors=True,
        ),
        ScoringRoute(
            "/pooling",
            "vLLM: rewards as vectors",
            _decode_input,
            _encode_vectors,
            WirePoolingRequest,
            list_schema({"object": {"const": "pooling"}, "data": VECTOR}),
            answers_vectors=True,
        ),
        _pairs_route("/score"),
        _pairs_route("/v1/score", _recognises_pairs),
    ),
)
