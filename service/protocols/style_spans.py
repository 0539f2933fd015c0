"""The bodies of ``POST /v1/style``: texts, and where in each of them the style block's markers are.

Pure: it depends neither on a web framework nor on an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from service.diagnostics.lexicon import StyleSpan
from service.diagnostics.repetition import Span
from service.errors import ItemTooLong, TooManyItems
from service.protocols.json_body import decode_body
from service.settings import LimitSettings

REPETITION = "repetition"
"""The kind of a span that occurred before in its text."""


class WireStyleRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /v1/style``."""

    texts: list[str]


_decoder = msgspec.json.Decoder(WireStyleRequest)


def parse_style_request(body: bytes, limits: LimitSettings) -> list[str]:
    """Decode a body to its texts; none is fine.

    Raises:
        MalformedBody, InvalidRequest: as for ``parse_score_request``.
        TooManyItems: more texts than ``max_compare_completions``.
        ItemTooLong: all texts together have more characters than ``max_item_chars``, which bounds the time.
    """
    wire: WireStyleRequest = decode_body(_decoder, body)
    num_texts, num_chars = len(wire.texts), sum(map(len, wire.texts))
    if num_texts > limits.max_compare_completions:
        raise TooManyItems(f"The request has {num_texts} texts; the limit is {limits.max_compare_completions}")
    if num_chars > limits.max_item_chars:
        raise ItemTooLong(f"The texts have {num_chars} characters together; the limit is {limits.max_item_chars}")
    return wire.texts


def render_style_spans(found: Sequence[tuple[Sequence[StyleSpan], Sequence[Span]]]) -> bytes:
    """Render the answer: for each text its spans, ordered by their first character.

    Args:
        found: markers and repetitions of each text.
    """
    return msgspec.json.encode({"spans": [_spans(markers, repetitions) for markers, repetitions in found]})


def _spans(markers: Sequence[StyleSpan], repetitions: Sequence[Span]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = [{"kind": span.kind, "start": span.start, "end": span.end} for span in markers]
    spans += [{"kind": REPETITION, "start": start, "end": end} for start, end in repetitions]
    return sorted(spans, key=lambda span: (span["start"], span["end"]))
