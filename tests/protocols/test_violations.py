"""Explanations of violations, with a schema that has every kind of type that a wire format may use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from service.protocols.violations import explain_violation

CANARY = "canary-19ab"


class WireText(msgspec.Struct, tag="text", forbid_unknown_fields=True):
    """One of two kinds of parts."""

    text: str


class WireImageLink(msgspec.Struct, tag="image", forbid_unknown_fields=True):
    """The other one."""

    address: Annotated[str, Meta(min_length=1, max_length=9)]


class WireThing(msgspec.Struct, forbid_unknown_fields=True):
    """The whole."""

    parts: list[WireText | WireImageLink] | str
    switch: bool = False
    share: Annotated[float, Meta(ge=0, le=1)] | None = None
    count: Annotated[int, Meta(ge=-2)] = 0
    mode: Literal["a", "b"] | None = None
    table: dict[str, Any] | None = None
    numbers: list[int | str] = []


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"parts": 5}, "Expected a string or a list of texts or image links, found an integer (at /parts)"),
        ({"parts": [{"type": CANARY}]}, 'Expected one of "text", "image" (at /parts/0/type)'),
        ({"parts": [{}]}, 'Missing field "type": one of "text", "image" (at /parts/0/type)'),
        ({"parts": [{"type": "text", "text": None}]}, "Expected a string, found null (at /parts/0/text)"),
        ({"parts": "", "switch": 1}, "Expected a boolean, found an integer (at /switch)"),
        ({"parts": "", "share": 1.5}, "Expected a number from 0 to 1 (at /share)"),
        ({"parts": "", "count": -3}, "Expected an integer of at least -2 (at /count)"),
        ({"parts": "", "mode": CANARY}, 'Expected one of "a", "b" (at /mode)'),
        ({"parts": "", "table": [CANARY]}, "Expected an object, found a list (at /table)"),
        ({"parts": "", "numbers": CANARY}, "Expected a list of integers or strings, found a string (at /numbers)"),
        ({"parts": "", "numbers": [None]}, "Expected an integer or a string, found null (at /numbers/0)"),
        ({"parts": "", "counts": 1}, 'Unknown field "counts"; did you mean "count"? (at the whole body)'),
        ({"address": 1}, 'Unknown field "address"; it is a field of an image link (at the whole body)'),
    ],
)
def test_expectations_of_every_type(body: dict[str, Any], detail: str) -> None:
    """What is expected follows from the type that decodes the value, and no value is repeated."""
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(msgspec.json.encode(body), type=WireThing)

    assert explain_violation(caught.value, WireThing).detail == detail
