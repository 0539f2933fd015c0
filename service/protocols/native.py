"""Request bodies of the service's own wire format, version 1, as ScoreRequests.

Pure: it depends neither on a web framework nor on an engine. A body is decoded once, from its bytes. Its errors
(``violations``) say where and what is expected and repeat no text of it. A field that is null counts as left out. Of
repeated keys in a JSON object the last one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from reward_client.options import DiagnosticsLevel, Truncation
from reward_client.signatures import item_digest

from service.errors import ItemTooLong, TooManyItems
from service.messages import MalformedMessage, read_completion, read_message, read_tools
from service.protocols.json_body import decode_body
from service.protocols.reward_weights import read_weights, weights_missing
from service.protocols.violations import invalid
from service.records import (
    MAX_PESSIMISM,
    Completion,
    Content,
    Encoding,
    Exchange,
    Item,
    Message,
    ScoreRequest,
    Steps,
    TemplatedText,
    TemplateVariable,
    TokenIds,
)
from service.settings import LimitSettings

MAX_NAME_CHARS = 256
"""Characters of an item's ``id`` or ``group``, which are echoed in the answer."""

MAX_MESSAGES = 1024
"""Messages of one prompt or completion: a chat template takes as long for an empty message as for a long one."""

_Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Pessimism = Annotated[float, Meta(ge=0, le=MAX_PESSIMISM)]
_Timeout = Annotated[float, Meta(ge=1, le=2**63)]


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """Defaults for options that a request leaves out, and the limits on every request."""

    limits: LimitSettings
    """Limits on size and time."""
    truncation: Truncation
    """Default for items over the token limit."""
    diagnostics: DiagnosticsLevel
    """Default level of diagnostics."""
    outputs: tuple[str, ...] = ("reward",)
    """Names of the numbers that the model gives for an item."""
    has_reward: bool = True
    """Whether there is a reward where a request has no weights."""


class WireMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation. ``content`` may be left out of a turn with ``tool_calls``."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class WireItem(msgspec.Struct, forbid_unknown_fields=True):
    """One text to score, in exactly one of three forms: prompt and completion, templated text, or token ids.

    A list of ``steps`` takes the place of the completion.
    """

    prompt: str | list[WireMessage] | None = None
    completion: str | list[WireMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    token_ids: list[_TokenId] | None = None
    steps: list[Annotated[str, Meta(min_length=1)]] | Literal["marker", "turns"] | None = None
    step_token_id: _TokenId | None = None
    id: _Name | None = None
    group: _Name | None = None


class WireOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Options of both scoring routes."""

    diagnostics: Literal["none", "basic", "full"] | None = None
    truncation: Literal["error", "prompt_left"] | None = None
    template: Literal["chat", "concat", "pair"] | None = None
    chat_template_kwargs: dict[str, TemplateVariable] | None = None
    special_tokens: Literal["read", "escape"] | None = None
    timeout_ms: _Timeout | None = None
    weights: dict[str, float] | None = None
    pessimism: _Pessimism | None = None


class WireScoreRequest(WireOptions, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/score``."""

    items: list[WireItem]
    digests: bool | None = None


class WireCompareRequest(WireOptions, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/compare``: completions of one prompt, to be ranked."""

    prompt: str | list[WireMessage]
    completions: list[str | list[WireMessage]]
    tools: list[dict[str, Any]] | None = None


_FORM_FIELDS = ("prompt", "completion", "text", "token_ids")


class _RawItems(msgspec.Struct):
    """The items of a request as the bytes that stand in its body."""

    items: list[msgspec.Raw]


_raw_items_decoder = msgspec.json.Decoder(_RawItems)
_score_decoder = msgspec.json.Decoder(WireScoreRequest)
_compare_decoder = msgspec.json.Decoder(WireCompareRequest)


def parse_score_request(body: bytes, defaults: RequestDefaults) -> ScoreRequest:
    """Decode the body of ``POST /v1/score``.

    Raises:
        MalformedBody: not JSON, not UTF-8, a number that JSON does not have, or bytes after the end.
        InvalidRequest: a field is missing, unknown, of the wrong type or out of range; has the pointer to it.
        TooManyItems: more items than ``max_request_items``.
        ItemTooLong: an item has more characters than ``max_item_chars``.
    """
    wire: WireScoreRequest = decode_body(_score_decoder, body)
    _check_count(len(wire.items), 1, defaults.limits.max_request_items, "/items", "items")
    items = tuple(_read_item(item, index, defaults.limits) for index, item in enumerate(wire.items))
    if wire.digests:
        raw = _raw_items_decoder.decode(body).items
        items = tuple(replace(item, digest=item_digest(bytes(one))) for item, one in zip(items, raw, strict=True))
    return _request(items, wire, defaults)


def parse_compare_request(body: bytes, defaults: RequestDefaults) -> ScoreRequest:
    """Decode the body of ``POST /v1/compare``: one item per completion, in order.

    Raises:
        MalformedBody, InvalidRequest, TooManyItems, ItemTooLong: as for ``parse_score_request``.
        WeightsMissing: the model has several outputs, and neither the request nor the service has weights.
    """
    wire: WireCompareRequest = decode_body(_compare_decoder, body)
    if wire.weights is None and not defaults.has_reward:
        raise weights_missing(defaults.outputs, "weights")
    limits = defaults.limits
    max_completions = min(limits.max_compare_completions, limits.max_request_items)
    _check_count(len(wire.completions), 2, max_completions, "/completions", "completions")
    prompt = read_prompt(wire.prompt, "/prompt")
    tools = tools_of(wire.tools, "/tools")
    items = tuple(
        Item(Exchange(prompt, completion_of(completion, f"/completions/{index}"), tools))
        for index, completion in enumerate(wire.completions)
    )
    return _request(items, wire, defaults)


def _request(items: tuple[Item, ...], options: WireOptions, defaults: RequestDefaults) -> ScoreRequest:
    for index, item in enumerate(items):
        if item.content.num_chars > defaults.limits.max_item_chars:
            raise ItemTooLong(
                f"Item {index} has {item.content.num_chars} characters; the limit is {defaults.limits.max_item_chars}"
            )
    encoding = Encoding(
        template=options.template,
        truncation=options.truncation or defaults.truncation,
        template_variables=template_variables(options.chat_template_kwargs),
        special_tokens=options.special_tokens,
    )
    timeout_s = _timeout_s(options.timeout_ms, defaults.limits.deadline_s)
    weights = read_weights(options.weights, defaults.outputs)
    level = options.diagnostics or defaults.diagnostics
    if options.pessimism is not None and level != "full":
        raise invalid("/pessimism", "needs_level_full", 'pessimism needs "diagnostics": "full"')
    return ScoreRequest(items, encoding, level, timeout_s, weights=weights, pessimism=options.pessimism)


def template_variables(given: Mapping[str, TemplateVariable] | None) -> tuple[tuple[str, TemplateVariable], ...]:
    """Return the names and values that a chat template gets, in the order of their names."""
    return tuple(sorted((given or {}).items()))


def _timeout_s(timeout_ms: float | None, deadline_s: float) -> float:
    # A longer timeout than the service allows is no error: the request gets its 504 at the service's deadline.
    return deadline_s if timeout_ms is None else min(timeout_ms / 1000, deadline_s)


def _check_count(count: int, minimum: int, maximum: int, pointer: str, noun: str) -> None:
    if count < minimum:
        raise invalid(pointer, "too_few", f"The request has {count} {noun}; it needs at least {minimum}")
    if count > maximum:
        raise TooManyItems(f"The request has {count} {noun}; the limit is {maximum}")


def _read_item(wire: WireItem, index: int, limits: LimitSettings) -> Item:
    return Item(_read_content(wire, index), wire.id, wire.group, steps=_read_steps(wire, index, limits))


def _read_steps(wire: WireItem, index: int, limits: LimitSettings) -> Steps | None:
    pointer = f"/items/{index}/steps"
    if wire.step_token_id is not None and wire.steps != "marker":
        raise invalid(f"/items/{index}/step_token_id", "not_one_form", "A marker token goes with steps: marker")
    match wire.steps:
        case None:
            return None
        case "marker":
            return Steps("marker", token_id=wire.step_token_id)
        case "turns":
            return Steps("turns")
        case []:
            raise invalid(pointer, "too_few", "An item with a list of steps needs at least one")
        case list(texts):
            if len(texts) > limits.max_item_steps:
                raise invalid(
                    pointer, "too_many", f"The item has {len(texts)} steps; the limit is {limits.max_item_steps}"
                )
            return Steps("texts", tuple(texts))


def _read_content(wire: WireItem, index: int) -> Content:
    completion_or_steps: Any = wire.completion
    if isinstance(wire.steps, list) and wire.completion is None:
        completion_or_steps = "\n".join(wire.steps)
    elif isinstance(wire.steps, list):
        raise invalid(f"/items/{index}", "not_one_form", "A list of steps takes the place of the completion")
    match wire.prompt, completion_or_steps, wire.text, wire.token_ids:
        case (str() | list()) as prompt, (str() | list()) as completion, None, None:
            return Exchange(
                read_prompt(prompt, f"/items/{index}/prompt"),
                completion_of(completion, f"/items/{index}/completion"),
                tools_of(wire.tools, f"/items/{index}/tools"),
            )
        case None, None, str(text), None if not wire.tools:
            return TemplatedText(text)
        case None, None, None, [_, *_] as token_ids if not wire.tools:
            return TokenIds(tuple(token_ids))
        case None, None, None, []:
            raise invalid(f"/items/{index}/token_ids", "too_few", "An item needs at least one token id")
    present = [name for name in _FORM_FIELDS if getattr(wire, name) is not None]
    present += ["tools"] if wire.tools else []
    raise invalid(
        f"/items/{index}",
        "not_one_form",
        "An item has either prompt and completion, or text, or token_ids, and nothing else; this one has "
        + (" and ".join(present) or "none of them"),
    )


def read_prompt(prompt: str | list[WireMessage], pointer: str) -> str | tuple[Message, ...]:
    """Return a prompt as a record; ``pointer`` is its place in the body.

    Raises:
        InvalidRequest: a list without messages.
    """
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise invalid(pointer, "too_few", "A prompt that is a list needs at least one message")
    return _read_messages(prompt, pointer)


def _read_messages(turns: list[WireMessage], pointer: str) -> tuple[Message, ...]:
    if len(turns) > MAX_MESSAGES:
        raise invalid(pointer, "too_many", f"A list has {len(turns)} messages; the limit is {MAX_MESSAGES}")
    messages = []
    for index, turn in enumerate(turns):
        try:
            messages.append(read_message(msgspec.structs.asdict(turn)))
        except MalformedMessage as error:
            raise invalid(f"{pointer}/{index}{error.pointer}", error.code, str(error)) from None
    return tuple(messages)


def completion_of(completion: str | list[WireMessage], pointer: str) -> Completion:
    """Return a completion as a record; ``pointer`` is its place in the body.

    Raises:
        InvalidRequest: messages that are no completion.
    """
    if isinstance(completion, str):
        return completion
    try:
        return read_completion(_read_messages(completion, pointer))
    except MalformedMessage as error:
        raise invalid(pointer, error.code, str(error)) from None


def tools_of(tools: list[dict[str, Any]] | None, pointer: str) -> str:
    """Return tools as a record; ``pointer`` is their place in the body.

    Raises:
        InvalidRequest: a value that JSON cannot hold.
    """
    try:
        return read_tools(tools)
    except MalformedMessage as error:
        raise invalid(f"{pointer}{error.pointer}", error.code, str(error)) from None
