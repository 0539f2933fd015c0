"""SGLang's routes: ``/v1/embeddings``, which verl reads, and ``/v1/score`` with ``query`` and ``items``.

A body of ``/v1/score`` is of this protocol if it has the key ``query``, which the native route does not have.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from service.protocols.base import (
    AS_THE_TOKENIZER,
    Answer,
    Call,
    Protocol,
    ProtocolContext,
    ScoringRoute,
    WireRequest,
    activation_for,
)
from service.protocols.inputs import (
    WirePoolingRequest,
    item_members,
    pooling_call,
    rows,
    usage_members,
    vectors,
)
from service.protocols.json_body import decode_body
from service.protocols.violations import invalid
from service.protocols.vllm import VECTOR, list_schema
from service.records import Content, Exchange, Item, TemplatedText, TokenIds

DEADLINE_S = 120.0
"""The client of verl would wait without end."""

_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class WireQueryRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /v1/score`` with one query (the prompt) and its items (the completions)."""

    query: str | list[_TokenId]
    items: str | list[str | list[_TokenId]]
    item_first: bool = False
    """Whether an item precedes the query in its text."""
    apply_softmax: bool | None = None
    model: str | None = None


class _Keys(msgspec.Struct):
    """The member of a body that the native route does not have."""

    query: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_query_decoder = msgspec.json.Decoder(WireQueryRequest)
_pooling_decoder = msgspec.json.Decoder(WirePoolingRequest)
_keys_decoder = msgspec.json.Decoder(_Keys)

_SCORES = {
    "type": "object",
    "required": ["object", "model", "scores", "usage"],
    "properties": {
        "object": {"const": "scoring"},
        "model": {"type": "string"},
        "scores": {
            "type": "array",
            "description": "For each item a list with its reward, or with all outputs of the model; raw.",
            "items": {"type": "array", "items": {"type": "number"}},
        },
        "usage": {"type": "object", "additionalProperties": {"type": "integer"}},
    },
}


def _decode_input(request: WireRequest, context: ProtocolContext) -> Call:
    return pooling_call(decode_body(_pooling_decoder, request.body), context)


def _encode_embeddings(call: Call, answer: Answer) -> bytes:
    wire: WirePoolingRequest = call.wire
    data = [
        {"object": "embedding", "index": index, "embedding": vector, **item_members(call, index, score)}
        for index, (vector, score) in enumerate(
            zip(vectors(call, answer, wire.encoding_format), answer.scores, strict=True)
        )
    ]
    return msgspec.json.encode(
        {"object": "list", "model": answer.model.name, "data": data, "usage": usage_members(answer)}
    )


def _recognises_query(body: bytes) -> bool:
    if b'"query"' not in body:
        return False
    try:
        return _keys_decoder.decode(body).query is not msgspec.UNSET
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _decode_query(request: WireRequest, context: ProtocolContext) -> Call:
    wire: WireQueryRequest = decode_body(_query_decoder, request.body)
    given: list[Any] = [wire.items] if isinstance(wire.items, str) else wire.items
    context.check_count(len(given))
    items = tuple(
        Item(_content(wire.query, item, f"/items/{index}", item_first=wire.item_first))
        for index, item in enumerate(given)
    )
    activation = activation_for({"apply_softmax": wire.apply_softmax}, context.settings)
    return Call(items, context.truncating(AS_THE_TOKENIZER), model=wire.model, activation=activation)


def _content(query: str | list[int], item: str | list[int], pointer: str, *, item_first: bool) -> Content:
    if isinstance(query, str) and isinstance(item, str):
        return TemplatedText(item + query) if item_first else Exchange(query, item)
    if isinstance(query, list) and isinstance(item, list):
        ids = item + query if item_first else query + item
        if ids:
            return TokenIds(tuple(ids))
        raise invalid(pointer, "too_few", "An item needs at least one token id")
    raise invalid(pointer, "not_one_form", "Query and items are either all texts or all token ids")


def _encode_scores(call: Call, answer: Answer) -> bytes:
    return msgspec.json.encode(
        {
            "object": "scoring",
            "model": answer.model.name,
            "scores": rows(call, answer),
            "usage": usage_members(answer),
        }
    )


PROTOCOL = Protocol(
    "sglang",
    DEADLINE_S,
    (
        ScoringRoute(
            "/v1/embeddings",
            "SGLang, verl: rewards as vectors",
            _decode_input,
            _encode_embeddings,
            WirePoolingRequest,
            list_schema({"object": {"const": "embedding"}, "embedding": VECTOR}),
            answers_vectors=True,
        ),
        ScoringRoute(
            "/v1/score",
            "SGLang: rewards of the items of one query",
            _decode_query,
            _encode_scores,
            WireQueryRequest,
            _SCORES,
            recognises=_recognises_query,
            answers_vectors=True,
        ),
    ),
)
