"""The route ``POST /predict`` of Text Embeddings Inference.

A list of strings is a pair in that protocol and is easily taken for a batch, so it is refused: a pair is
``[["a", "b"]]``, a batch is ``[["a"], ["b"]]``.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

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
from service.protocols.inputs import rows
from service.protocols.json_body import decode_body
from service.protocols.violations import invalid
from service.records import Content, Encoding, Exchange, Item, TemplatedText

DEADLINE_S = 50.0
LABEL = "LABEL_0"
"""Name of the only output of a scalar head, as transformers gives it; several outputs have their own names."""


class WirePredictRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /predict``."""

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    model: str | None = None


class _Request(msgspec.Struct, frozen=True):
    """What the answer needs of the request and of the model."""

    is_single: bool
    labels: tuple[str, ...]


_decoder = msgspec.json.Decoder(WirePredictRequest)

_PREDICTION = {
    "type": "array",
    "items": {"type": "object", "properties": {"score": {"type": "number"}, "label": {"type": "string"}}},
}
_ANSWER = {"anyOf": [_PREDICTION, {"type": "array", "items": _PREDICTION}], "description": "Rewards, raw."}


def _decode(request: WireRequest, context: ProtocolContext) -> Call:
    wire: WirePredictRequest = decode_body(_decoder, request.body)
    asked = {"raw_scores": None if wire.raw_scores is None else not wire.raw_scores}
    context.check_count(1 if isinstance(wire.inputs, str) else len(wire.inputs))
    items = tuple(Item(content) for content in _contents(wire.inputs))
    has_pairs = any(isinstance(item.content, Exchange) for item in items)
    if has_pairs and any(isinstance(item.content, TemplatedText) for item in items):
        raise invalid("/inputs", "not_one_form", "The entries of inputs are all texts or all pairs")
    facts = _Request(isinstance(wire.inputs, str), (LABEL,) if len(context.item_outputs) == 1 else context.item_outputs)
    encoding = context.truncating(Encoding() if has_pairs else AS_THE_TOKENIZER)
    if wire.truncate:
        # From the right the completion would be cut, so what is too long is refused.
        from_left = (wire.truncation_direction or "Right").lower() == "left"
        encoding = Encoding(encoding.template, "prompt_left" if from_left else "error", encoding.add_bos)
    return Call(items, encoding, model=wire.model, activation=activation_for(asked, context.settings), wire=facts)


def _contents(inputs: str | list[Any]) -> list[Content]:
    if isinstance(inputs, str):
        return [TemplatedText(inputs)]
    return [_content(entry, f"/inputs/{index}") for index, entry in enumerate(inputs)]


def _content(entry: str | list[str], pointer: str) -> Content:
    if isinstance(entry, str):
        raise invalid(pointer, "ambiguous", 'A list of strings is ambiguous; a pair is [["a", "b"]], texts are [["a"]]')
    if len(entry) == 1:
        return TemplatedText(entry[0])
    if len(entry) == 2:
        return Exchange(*entry)
    raise invalid(
        pointer, "not_one_form", f"An entry has one text or two, a prompt and its completion, not {len(entry)}"
    )


def _encode(call: Call, answer: Answer) -> bytes:
    request: _Request = call.wire
    labels = request.labels
    predictions = [
        [{"score": number, "label": label} for number, label in zip(row, labels, strict=True)]
        for row in rows(call, answer)
    ]
    return msgspec.json.encode(predictions[0] if request.is_single else predictions)


PROTOCOL = Protocol(
    "tei",
    DEADLINE_S,
    (
        ScoringRoute(
            "/predict",
            "Text Embeddings Inference: rewards of texts or of pairs",
            _decode,
            _encode,
            WirePredictRequest,
            _ANSWER,
            answers_vectors=True,
        ),
    ),
)
