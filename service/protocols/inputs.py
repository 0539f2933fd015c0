"""Inputs as the pooling routes of vLLM and SGLang take them: texts, token ids, or one conversation.

A text is tokenized as the tokenizer does it, with its BOS, unless the request says otherwise: verl cuts one leading BOS
from the rendered conversation, because the server is expected to add it.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from reward_client.options import Truncation

from service.protocols.base import (
    AS_IT_IS,
    AS_THE_TOKENIZER,
    Answer,
    Call,
    ProtocolContext,
    activation_for,
    is_truncated,
    num_tokens,
    outputs_of,
    reward_of,
    sigmoid,
)
from service.protocols.native import WireMessage, completion_of, read_prompt, template_variables, tools_of
from service.protocols.violations import invalid
from service.records import Encoding, Exchange, Item, Score, TemplatedText, TemplateVariable, TokenIds

_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


ACTIVATION_FLAGS = ("use_activation", "activation", "softmax")
"""All names that vLLM's flag for an activation has had."""


_RENDERING_OPTIONS = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)
"""Fields that would change the text of a conversation; to ignore them would give the reward of another text."""


class WirePoolingOptions(msgspec.Struct, kw_only=True):
    """Options of vLLM's pooling routes."""

    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    """-1: the model's limit."""
    truncation_side: Literal["left", "right"] | None = None


class WirePoolingRequest(WirePoolingOptions, kw_only=True):
    """The body of the routes that take one input or several: a text, texts, token ids, or one conversation."""

    input: str | list[str | _TokenId | list[_TokenId]] | None = None
    messages: list[WireMessage] | None = None
    """A conversation whose last message is the assistant's."""
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, TemplateVariable] | None = None
    tools: list[dict[str, Any]] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    model: str | None = None


def pooling_call(wire: WirePoolingRequest, context: ProtocolContext) -> Call:
    """Return the call of a request.

    Raises:
        InvalidRequest: not exactly one of input and messages; a conversation that does not end with a completion; an
            option that would change the reward and is not supported.
    """
    if (wire.input is None) == (wire.messages is None):
        raise invalid("", "not_one_form", "A request has either input or messages")
    flags = {name: getattr(wire, name) for name in ACTIVATION_FLAGS}
    encoding, max_tokens = truncation_of(wire, context)
    if wire.messages is not None:
        items: tuple[Item, ...] = (_conversation(wire),)
        encoding = replace(encoding, template_variables=template_variables(wire.chat_template_kwargs))
    else:
        given = wire.input or []
        if not isinstance(given, str) and not isinstance(next(iter(given), None), int):
            context.check_count(len(given))
        items = _items(given)
        special = AS_IT_IS if wire.add_special_tokens is False else AS_THE_TOKENIZER
        encoding = replace(special, truncation=encoding.truncation)
    return Call(
        items,
        encoding,
        model=wire.model,
        max_tokens=max_tokens,
        activation=activation_for(flags, context.settings),
        wire=wire,
    )


def truncation_of(wire: WirePoolingOptions, context: ProtocolContext) -> tuple[Encoding, int | None]:
    """Return an encoding with the truncation of a request, and the longest item that it allows.

    Nothing is cut from the right, where the completion is, and to no other length than the model's limit: there the
    item is refused if it is longer.
    """
    limit = wire.truncate_prompt_tokens
    default = context.truncating(Encoding())
    if limit is None:
        return default, None
    if 0 <= limit < context.max_input_tokens:
        return default, limit
    truncation: Truncation = "prompt_left" if wire.truncation_side == "left" else "error"
    return Encoding(truncation=truncation), None


def numbers(call: Call, answer: Answer) -> list[float]:
    """Return one number for each item: the rewards, or their sigmoid if that was asked for and is allowed."""
    rewards = [reward_of(score) for score in answer.scores]
    return [sigmoid(reward) for reward in rewards] if call.activation == "sigmoid" else rewards


def rows(call: Call, answer: Answer) -> list[list[float]]:
    """Return all numbers of each item [item][output], or their sigmoid if that was asked for and is allowed."""
    outputs = [list(outputs_of(score)) for score in answer.scores]
    return [[sigmoid(number) for number in row] for row in outputs] if call.activation == "sigmoid" else outputs


def vectors(call: Call, answer: Answer, encoding_format: str) -> list[list[float] | str]:
    """Return all numbers of each item as a vector; ``base64``: of float32 in little-endian order."""
    if encoding_format == "float":
        return [*rows(call, answer)]
    return [base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() for row in rows(call, answer)]


def item_members(score: Score) -> dict[str, Any]:
    """Return members that an entry of an answer has in addition to those of the protocol."""
    return {"tokens": num_tokens(score), "truncated": is_truncated(score)}


def usage_members(answer: Answer) -> dict[str, int]:
    """Return the tokens of an answer, all of which are of prompts in the words of these protocols."""
    total = answer.usage.scored_tokens
    return {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0}


def _items(given: str | Sequence[Any]) -> tuple[Item, ...]:
    if isinstance(given, str):
        return (Item(TemplatedText(given)),)
    entries: list[Any] = list(given)
    kinds = {type(entry) for entry in entries}
    if kinds == {int}:
        return (_token_item(entries, "/input"),)
    if kinds == {str}:
        return tuple(Item(TemplatedText(text)) for text in entries)
    if kinds == {list}:
        return tuple(_token_item(ids, f"/input/{index}") for index, ids in enumerate(entries))
    if not kinds:
        raise invalid("/input", "too_few", "An input that is a list needs at least one entry")
    raise invalid("/input", "not_one_form", "The entries of an input are all texts, all ids, or all lists of ids")


def _token_item(ids: Sequence[int], pointer: str) -> Item:
    if not ids:
        raise invalid(pointer, "too_few", "An item needs at least one token id")
    return Item(TokenIds(tuple(ids)))


def _conversation(wire: WirePoolingRequest) -> Item:
    turns = wire.messages or []
    for name in _RENDERING_OPTIONS:
        if getattr(wire, name):
            raise invalid(f"/{name}", "unsupported", "A conversation is rendered by the model's own chat template")
    if wire.add_special_tokens:
        raise invalid("/add_special_tokens", "unsupported", "The chat template writes the special tokens of messages")
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise invalid(
            "/messages", "no_completion", "A conversation has a prompt, and its last message is the assistant's"
        )
    return Item(
        Exchange(
            read_prompt(turns[:-1], "/messages"),
            completion_of(turns[-1:], "/messages"),
            tools_of(wire.tools, "/tools"),
        )
    )
