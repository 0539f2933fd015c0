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
    softmax,
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
        softmax=context.gives_probabilities and False not in flags.values(),
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


def step_rows(call: Call, score: Score) -> list[list[float]]:
    """Return the numbers of an item at each of its steps [step][output]: outputs, or a softmax over several."""
    if len(score.step_outputs[0]) == 1:
        return [[reward] for reward in score.step_rewards]
    rows_of_item = [list(outputs) for outputs in score.step_outputs]
    return [softmax(row) for row in rows_of_item] if call.softmax else rows_of_item


def vectors(call: Call, answer: Answer, encoding_format: str) -> list[list[float] | list[list[float]] | str]:
    """Return all numbers of each item as a vector, of an item with steps as one vector for each step.

    ``base64``: float32 in little-endian order, the vectors of an item one after the other.
    """
    found: list[list[float] | list[list[float]] | str] = []
    for row, score in zip(_rows_or_none(call, answer), answer.scores, strict=True):
        steps = [row] if row is not None else step_rows(call, score)
        if encoding_format == "base64":
            numbers_of_item = [number for step in steps for number in step]
            found.append(base64.b64encode(struct.pack(f"<{len(numbers_of_item)}f", *numbers_of_item)).decode())
        else:
            found.append(steps if row is None else row)
    return found


def _rows_or_none(call: Call, answer: Answer) -> list[list[float] | None]:
    """Return the numbers of each item; None where it has steps."""
    if not any(score.step_outputs for score in answer.scores):
        return [*rows(call, answer)]
    return [None] * len(answer.scores)


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
