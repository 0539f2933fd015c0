"""Builds request bodies: items are encoded as JSON once and split into chunks.

Pure: no socket, no clock. Errors give indices and counts, never a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias

from reward_client.checks import check_completion, check_prompt, elements, is_list, positive_integer
from reward_client.errors import InvalidArgument

ChatMessage: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[ChatMessage]
Completion: TypeAlias = str | Sequence[ChatMessage]
WireItem: TypeAlias = Mapping[str, Any]
Steps: TypeAlias = Sequence[Sequence[str]] | Literal["marker", "turns"]
"""Steps of completions: as texts, one list for each prompt; at each marker in the completions; or their turns."""
Weights: TypeAlias = Mapping[str, float]
"""Weight of each output of a model in the reward, by the name of the output."""


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """Limits of one request; the defaults are below the service's own (2,048 items, 64 MiB)."""

    max_items: int = 256
    """Items of one request."""

    max_bytes: int = 16 * 1024 * 1024
    """Bytes of the encoded items of one request."""

    def __post_init__(self) -> None:
        positive_integer(self.max_items, "max_items")
        positive_integer(self.max_bytes, "max_bytes")


DEFAULT_CHUNKS = ChunkLimits()


def exchange_items(prompts: Iterable[Prompt], completions: Iterable[Completion]) -> list[dict[str, Any]]:
    """Return the wire items of prompts and their completions.

    Raises:
        InvalidArgument: one of the two is no list, the lists differ in length, or an element has another type.
    """
    hint = "; for several completions of one prompt: [prompt] * len(completions)"
    prompt_list = elements(prompts, "prompts", "prompts, one for each completion", hint)
    completion_list = elements(completions, "completions", "completions, one for each prompt")
    if len(prompt_list) != len(completion_list):
        raise InvalidArgument(
            f"{len(prompt_list)} prompts, but {len(completion_list)} completions; each completion needs its prompt"
        )
    return [
        {
            "prompt": prompt_content(prompt, f"prompts[{index}]"),
            "completion": completion_content(completion, f"completions[{index}]"),
        }
        for index, (prompt, completion) in enumerate(zip(prompt_list, completion_list, strict=True))
    ]


def step_items(
    prompts: Iterable[Prompt], completions: Iterable[Completion] | None, steps: Steps | None
) -> list[dict[str, Any]]:
    """Return the wire items of prompts with their completions, or with their steps in place of completions.

    Raises:
        InvalidArgument: completions and lists of steps are both given, or neither; a list of steps is no list of
            strings; and as `exchange_items`.
    """
    if steps is None or isinstance(steps, str):
        if steps not in (None, "marker", "turns"):
            raise InvalidArgument("steps must be lists of strings, one for each prompt, or 'marker' or 'turns'")
        if completions is None:
            raise InvalidArgument("completions are missing: only lists of steps take their place")
        items = exchange_items(prompts, completions)
        return items if steps is None else [{**item, "steps": steps} for item in items]
    if completions is not None:
        raise InvalidArgument("lists of steps take the place of completions: pass one of the two")
    step_lists = [elements(one, f"steps[{index}]", "steps of a completion") for index, one in enumerate(steps)]
    for index, texts in enumerate(step_lists):
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise InvalidArgument(f"steps[{index}] must be a list of at least one string, none of them empty")
    items = exchange_items(prompts, [""] * len(step_lists))
    return [{"prompt": item["prompt"], "steps": texts} for item, texts in zip(items, step_lists, strict=True)]


def prompt_content(prompt: Prompt, name: str = "prompt") -> str | list[dict[str, Any]]:
    """Return a prompt in wire format, without keys whose value is None (data sets pad missing keys with None).

    Raises:
        InvalidArgument: it is neither a string nor a list of messages.
    """
    check_prompt(prompt, name)
    return prompt if isinstance(prompt, str) else [without_none(message) for message in prompt]


def completion_content(completion: Completion, name: str = "completion") -> str | list[dict[str, Any]]:
    """Return a completion in wire format: its text, also of one assistant message that is only text, or its turns.

    Raises:
        InvalidArgument: it is neither a string nor a list of messages that begins with an assistant's.
    """
    if isinstance(completion, str):
        return completion
    messages = list(completion) if is_list(completion) else completion
    check_completion(messages, name)
    turns = [without_none(message) for message in messages]
    match turns:
        case [{"role": "assistant", "content": str(content), **rest}] if not rest:
            return content
    return turns


def encode_items(items: Sequence[WireItem]) -> list[bytes]:
    """Return each item as JSON in UTF-8, in order.

    Raises:
        InvalidArgument: an item is not JSON data; gives its index, never its text.
    """
    encoded = []
    for index, item in enumerate(items):
        try:
            encoded.append(encode(item))
        except (TypeError, ValueError):
            # The cause is suppressed because it contains the text.
            raise InvalidArgument(
                f"Item {index} is not JSON data (a lone surrogate, a NaN or a foreign type)"
            ) from None
    return encoded


def group_key(item: WireItem) -> object:
    """Return the key that is equal for consecutive items of one prompt."""
    group = item.get("group")
    return item.get("prompt") if group is None else group


def chunk_ranges(sizes: Sequence[int], groups: Sequence[object], limits: ChunkLimits) -> Iterator[range]:
    """Split a call into requests: consecutive index ranges that cover all items, in order.

    Consecutive items of one group (completions of one prompt) stay in one request wherever it can hold them, because
    there they share their prefix and are compared with each other. An item above the limit gets a request of its own;
    the service decides about it.

    Args:
        sizes: bytes of each item.
        groups: the group key of each item; only consecutive ones are compared.
        limits: what one request may hold.
    """
    ends = [0, *accumulate(sizes)]

    def fits(start: int, stop: int) -> bool:
        return stop - start <= limits.max_items and ends[stop] - ends[start] <= limits.max_bytes

    start = group_start = 0
    for index in range(len(sizes)):
        if index > 0 and groups[index] != groups[index - 1]:
            group_start = index
        while start < index and not fits(start, index + 1):
            cut = group_start if start < group_start else index
            yield range(start, cut)
            start = cut
    if sizes:
        yield range(start, len(sizes))


def score_body(encoded: Sequence[bytes], options: Mapping[str, Any], timeout_s: float) -> bytes:
    """Return the body of ``POST /v1/score`` around items that are already JSON."""
    tail = encode({**options, "timeout_ms": timeout_ms(timeout_s)})
    return b'{"items":[' + b",".join(encoded) + b"]," + tail[1:]


def timeout_ms(seconds: float) -> int:
    """Return a remaining time in wire format: whole milliseconds, at least one, at most 64 bits."""
    return max(1, min(int(seconds * 1000), 2**63 - 1))


def encode(data: Mapping[str, Any]) -> bytes:
    """Return an object as compact JSON in UTF-8; raises ValueError or TypeError for what JSON cannot represent."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields whose value is not None."""
    return {name: value for name, value in fields.items() if value is not None}
