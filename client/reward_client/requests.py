"""Builds request bodies: items are encoded as JSON once and split into chunks.

Pure: no socket, no clock. Errors give indices and counts, never a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

ChatMessage: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[ChatMessage]
Completion: TypeAlias = str | Sequence[ChatMessage]
WireItem: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """Limits of one request; the defaults are below the service's own (2,048 items, 64 MiB)."""

    max_items: int = 256
    """Items of one request."""

    max_bytes: int = 16 * 1024 * 1024
    """Bytes of the encoded items of one request."""


DEFAULT_CHUNKS = ChunkLimits()


def exchange_items(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Return the wire items of prompts and their completions.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts, but {len(completions)} completions")
    return [
        {"prompt": prompt_content(prompt), "completion": completion_content(completion)}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def prompt_content(prompt: Prompt) -> str | list[dict[str, Any]]:
    """Return a prompt in wire format, without keys whose value is None (data sets pad missing keys with None)."""
    return prompt if isinstance(prompt, str) else [without_none(message) for message in prompt]


def completion_content(completion: Completion) -> str | list[dict[str, Any]]:
    """Return a completion in wire format: its text, also of one assistant message that is only text, or its turns."""
    if isinstance(completion, str):
        return completion
    turns = [without_none(message) for message in completion]
    match turns:
        case [{"role": "assistant", "content": str(content), **rest}] if not rest:
            return content
        case _:
            return turns


def encode_items(items: Sequence[WireItem]) -> list[bytes]:
    """Return each item as JSON in UTF-8, in order.

    Raises:
        ValueError: an item is not JSON data; gives its index, never its text.
    """
    encoded = []
    for index, item in enumerate(items):
        try:
            encoded.append(encode(item))
        except (TypeError, ValueError):
            # The cause is suppressed because it contains the text.
            raise ValueError(f"Item {index} is not JSON data (a lone surrogate, a NaN or a foreign type)") from None
    return encoded


def group_key(item: WireItem) -> object:
    """Return the key that is equal for consecutive items of one prompt."""
    return item.get("group") or item.get("prompt")


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
    """Return a remaining time in wire format: whole milliseconds, at least one."""
    return max(1, int(seconds * 1000))


def encode(data: Mapping[str, Any]) -> bytes:
    """Return an object as compact JSON in UTF-8; raises ValueError or TypeError for what JSON cannot represent."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields whose value is not None."""
    return {name: value for name, value in fields.items() if value is not None}
