"""Planning of a request's work: the chunks in which it is tokenized, and the sequences that the engine computes.

Pure functions on items and token sequences.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from service.errors import HttpError
from service.records import Item, TokenSequence

CHUNK_CHARS = 65_536
"""Characters that are tokenized in one call; small requests are tokenized between two chunks of a large one."""

MIN_ITEM_CHARS = 1024
"""Minimum of characters that an item counts in a chunk, so that a chunk has at most 64 items."""

SMALL_REQUEST_ITEMS = CHUNK_CHARS // MIN_ITEM_CHARS
"""Up to this many items the event loop plans and completes a request itself: handing it to a thread takes longer."""

SMALL_CHUNK_CHARS = 4096
"""Up to this many characters the event loop also tokenizes and analyses texts: it takes about a millisecond."""

PREFIX_KEY_TOKENS = 64
"""Leading tokens that make the prefix key of a sequence whose prompt length is unknown."""


_Computation: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""The row of a sequence and its step positions: what its outputs are computed from."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine computes for a request: each distinct token sequence once."""

    sequences: tuple[TokenSequence, ...]
    """In lexical order of their ids, so that sequences with a common prefix are adjacent."""

    prefixes: tuple[Hashable, ...]
    """For each sequence a key that is equal for sequences of one prompt."""

    item_indices: tuple[tuple[int, ...], ...]
    """For each sequence the indices of the items that it answers, in order."""


def chunks_of(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Split the items, in order, into lists of about `CHUNK_CHARS` characters.

    The item that reaches the limit is the last of its list, however long it is.
    """
    chunk: list[Item] = []
    num_chars = 0
    for item in items:
        chunk.append(item)
        num_chars += max(item.content.num_chars, MIN_ITEM_CHARS)
        if num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def is_small_chunk(chunk: Sequence[Item]) -> bool:
    """Whether a chunk is tokenized faster on the event loop than in a thread, the hand-over included."""
    return len(chunk) <= SMALL_REQUEST_ITEMS and sum(item.content.num_chars for item in chunk) <= SMALL_CHUNK_CHARS


def plan_work(items: Sequence[Item], encoded: Sequence[TokenSequence | HttpError]) -> Work:
    """Leave out errors and repeated token sequences, and sort the rest so that common prefixes are adjacent.

    Equal token ids are computed once, so equal texts of a request get bit-identical rewards in any batch composition.

    Args:
        items: items of the request.
        encoded: the token sequence or the error of each item, in order.
    """
    first: dict[_Computation, TokenSequence] = {}
    indices: dict[_Computation, list[int]] = {}
    for index, sequence in enumerate(encoded):
        if isinstance(sequence, TokenSequence):
            key = sequence.row, sequence.step_positions
            first.setdefault(key, sequence)
            indices.setdefault(key, []).append(index)
    distinct = sorted(first)
    return Work(
        sequences=tuple(first[key] for key in distinct),
        prefixes=tuple(prefix_key(items[indices[key][0]], first[key]) for key in distinct),
        item_indices=tuple(tuple(indices[key]) for key in distinct),
    )


def prefix_key(item: Item, sequence: TokenSequence) -> Hashable:
    """Return a key that is equal for sequences of one prompt, in this request and in others.

    It is a hash, which may collide: it only decides which sequences are put into one batch. What they share there is
    found by comparing token ids.
    """
    if sequence.num_prompt_tokens is not None:
        return hash(sequence.token_ids[: sequence.num_prompt_tokens])
    if item.group is not None:
        return item.group, hash(sequence.token_ids[:PREFIX_KEY_TOKENS])
    return hash(sequence.token_ids[:PREFIX_KEY_TOKENS])
