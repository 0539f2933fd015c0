"""Whatever the bytes of a body are, every parser gives items or an error of the service, and repeats no text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import BODIES, CANARY, mutated_body

from service.errors import HttpError
from service.protocols.base import ProtocolContext, WireRequest
from service.protocols.native import RequestDefaults, parse_compare_request, parse_score_request
from service.protocols.problem import problem
from service.protocols.registry import PROTOCOLS
from service.records import ModelIdentity
from service.settings import LimitSettings, ProtocolSettings

DEFAULTS = RequestDefaults(LimitSettings(max_item_chars=3000), "error", "basic")
CONTEXT = ProtocolContext(
    model=ModelIdentity("oracle", "1"),
    max_input_tokens=100,
    limits=LimitSettings(max_item_chars=3000),
    truncation="error",
    is_calibrated=False,
    special_tokens=frozenset({"<|im_end|>"}),
    settings=ProtocolSettings(activation="sigmoid"),
)
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "/v1/score": lambda body: parse_score_request(body, DEFAULTS),
    "/v1/compare": lambda body: parse_compare_request(body, DEFAULTS),
} | {
    route.path: lambda body, route=route: route.decode(
        WireRequest(body, path={"model": "oracle", "name": "oracle", "version": "1"}), CONTEXT
    )
    for protocol in PROTOCOLS
    for route in protocol.scoring
}


def check(decode: Callable[[bytes], Any], body: bytes) -> None:
    refusal = None
    try:
        assert decode(body) is not None
    except HttpError as error:
        refusal = error
    assert refusal is None or 400 <= refusal.status < 500
    assert refusal is None or CANARY not in str(problem(refusal, "id"))


@pytest.mark.parametrize("path", DECODERS)
def test_mutated_bodies_give_items_or_an_error_of_the_service(path: str) -> None:
    """Three hundred mutations of a valid body of each route."""
    generator = random.Random(path)
    for _ in range(300):
        check(DECODERS[path], mutated_body(generator, path if path in BODIES else "/v1/score"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.sampled_from(sorted(
        {"items", "prompt", "completion", "text", "token_ids", "steps", "role", "content", "input", "inputs", "data",
         "shape", "name", "datatype", "messages", "response", "query", "model", "weights", "timeout_ms"}
    )), inside, max_size=5),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(value=JSON)
def test_any_json_gives_items_or_an_error_of_the_service(value: Any) -> None:
    """Any JSON value with the names of fields, in every parser."""
    import msgspec

    body = msgspec.json.encode(value)
    for decode in DECODERS.values():
        check(decode, body)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(body=st.binary(max_size=60))
def test_any_bytes_give_an_error_of_the_service(body: bytes) -> None:
    """Any bytes, in every parser."""
    for decode in DECODERS.values():
        check(decode, body)
