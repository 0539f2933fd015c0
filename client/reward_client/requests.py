"""What callers hand over becomes the bytes of requests: items, encoded once, cut into chunks.

Pure: no socket, no clock. Errors name places and counts, never a text.
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
    """What one request of ours may hold; the defaults stay below the service's own (2,048 items, 64 MiB)."""

    max_items: int = 256
    max_bytes: int = 16 * 1024 * 1024


DEFAULT_CHUNKS = ChunkLimits()


def exchange_items(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Return the wire items of prompts and their completions.

    Raises:
        ValueError: the lists differ in length, or a completion is not one text.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts, but {len(completions)} completions")
    return [
        {"prompt": prompt_content(prompt), "completion": completion_text(completion)}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def prompt_content(prompt: Prompt) -> str | list[dict[str, Any]]:
    """Return a prompt as the wire has it, without the keys that a data set filled with None for want of a value."""
    return prompt if isinstance(prompt, str) else [without_none(message) for message in prompt]


def completion_text(completion: Completion) -> str:
    """Return the text of a completion: itself, or the content of its one assistant message.

    Raises:
        ValueError: it is a conversation of several turns, or its content is no text.
    """
    if isinstance(completion, str):
        return completion
    match list(completion):
        case [{"role": "assistant", "content": str(content)}]:
            return content
        case turns:
            raise ValueError(
                f"A completion is a text or a list of one assistant message; this one has {len(turns)} turns"
            )


def encode_items(items: Sequence[WireItem]) -> list[bytes]:
    """Return each item as JSON in UTF-8, in order.

    Raises:
        ValueError: an item is not JSON data; names its place, never its text.
    """
    encoded = []
    for index, item in enumerate(items):
        try:
            encoded.append(encode(item))
        except (TypeError, ValueError):
            # The cause is cut off: it carries the text.
            raise ValueError(f"Item {index} is not JSON data (a lone surrogate, a NaN or a foreign type)") from None
    return encoded


def group_key(item: WireItem) -> object:
    """Return what tells whether neighbours answer one prompt."""
    return item.get("group") or item.get("prompt")


def chunk_ranges(sizes: Sequence[int], groups: Sequence[object], limits: ChunkLimits) -> Iterator[range]:
    """Cut a call into requests: consecutive ranges of indices that together cover all, in order.

    Neighbours of one group (completions of one prompt) stay in one request wherever a request can hold them, because
    there they share their prefix and are judged beside each other. An item above the limit stands alone; the service
    judges it.

    Args:
        sizes: bytes of each item.
        groups: what each item belongs to; only neighbours are compared.
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
    """Return the wire's form of a remaining time: whole milliseconds, at least one."""
    return max(1, int(seconds * 1000))


def encode(data: Mapping[str, Any]) -> bytes:
    """Return an object as compact JSON in UTF-8; raises ValueError or TypeError where JSON has no word for it."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say something."""
    return {name: value for name, value in fields.items() if value is not None}
