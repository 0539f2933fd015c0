"""Truncation: which tokens of an item over the limit are dropped, or why it is refused.

Pure: the completion, special tokens at the start, and steps are never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile

from reward_client.options import Truncation

from service.errors import HttpError, InvalidRequest, SequenceTooLong
from service.records import (
    TokenSequence,
)


@dataclass(frozen=True, slots=True)
class UncutTokens:
    """The tokens of an item before truncation."""

    sequence: TokenSequence

    num_droppable: int
    """Tokens before this index may be dropped, except for the leading special ones."""


def fit(
    tokens: UncutTokens, truncation: Truncation, limit: int, leading_special_ids: frozenset[int]
) -> TokenSequence | HttpError:
    """Return the sequence of an item within the token limit.

    Args:
        tokens: the tokens of the item.
        truncation: what happens to an item over the limit.
        limit: maximal length of a sequence, in tokens.
        leading_special_ids: ids at the start of a sequence that are never dropped.

    Returns:
        The sequence, or one of
        InvalidRequest: no tokens at all;
        SequenceTooLong: more tokens than the limit where truncation was not requested or is not possible.
    """
    sequence = tokens.sequence
    ids = sequence.token_ids
    if not ids:
        return InvalidRequest("The item has no tokens.")
    excess = len(ids) - limit
    if excess <= 0:
        return sequence
    if truncation == "error":
        return too_long(len(ids), limit)
    num_leading = sum(1 for _ in takewhile(leading_special_ids.__contains__, ids))
    if excess > tokens.num_droppable - num_leading:
        end_of_prompt = sequence.num_prompt_tokens
        if end_of_prompt is None and not tokens.num_droppable:
            return SequenceTooLong(
                f"{len(ids):,} tokens; the limit is {limit:,}. Where the completion begins is unknown, and it is "
                "never truncated."
            )
        return SequenceTooLong(
            f"{len(ids):,} tokens; the limit is {limit:,}. "
            f"{len(ids) - (end_of_prompt or len(ids)):,} of them are in the completion, which is never truncated."
        )
    if sequence.step_positions[:1] and sequence.step_positions[0] < num_leading + excess:
        return SequenceTooLong(f"{len(ids):,} tokens; the limit is {limit:,}, and truncation would drop a step.")
    return replace(
        sequence,
        token_ids=ids[:num_leading] + ids[num_leading + excess :],
        step_positions=tuple(position - excess for position in sequence.step_positions),
        token_types=sequence.token_types[:num_leading] + sequence.token_types[num_leading + excess :],
        num_prompt_tokens=None if sequence.num_prompt_tokens is None else sequence.num_prompt_tokens - excess,
        num_dropped=excess,
    )


def too_long(num_tokens: int, limit: int) -> SequenceTooLong:
    """Return the error of a sequence over the limit."""
    return SequenceTooLong(f"{num_tokens:,} tokens; the limit is {limit:,}.")
