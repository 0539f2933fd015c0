"""Selects the pairs that a run trains on, and counts the others by the reason why they are left out.

Pure: it takes pairs and a recipe and returns pairs and counts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from service.data.holdout import is_held_out
from service.errors import DatasetError
from training.pairs import TokenizedPair
from training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Numbers of pairs; all but ``shortened`` add up to the pairs that were read."""

    held_out: int
    """Left out by the hold-out rule (see service.data.holdout)."""

    too_long: int
    """Left out because a side has more tokens than the recipe's ``max_length``."""

    unbalanced: int
    """Left out so that the longer completion is chosen as often as the shorter one."""

    trained: int

    disputed: int = 0
    """Left out because too few annotators preferred the chosen completion."""

    refused: int = 0
    """Left out because they cannot be tokenized, for example because the chat template refuses their messages."""

    shortened: int = 0
    """Of the trained pairs, those whose prompt lost its oldest messages."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The pairs to train on, in the order of the data, and the counts of all pairs."""

    pairs: list[TokenizedPair]
    counts: PairCounts


def select_pairs(pairs: Sequence[TokenizedPair], recipe: Recipe, num_refused: int = 0) -> Selection:
    """Return the pairs that the recipe includes.

    Args:
        pairs: all that could be tokenized.
        recipe: of the run.
        num_refused: number of pairs that could not be tokenized, for the counts.

    Raises:
        DatasetError: the recipe includes no pair.
    """
    allowed = [pair for pair in pairs if not is_held_out(pair.pair.prompt, recipe.hold_out_percent)]
    undisputed = [pair for pair in allowed if _has_support(pair, recipe.min_support)]
    short_enough = [pair for pair in undisputed if pair.num_tokens <= recipe.max_length]
    selected = balance_lengths(short_enough, recipe.seed) if recipe.balance_lengths else short_enough
    counts = PairCounts(
        held_out=len(pairs) - len(allowed),
        too_long=len(undisputed) - len(short_enough),
        unbalanced=len(short_enough) - len(selected),
        trained=len(selected),
        disputed=len(allowed) - len(undisputed),
        refused=num_refused,
        shortened=sum(pair.num_dropped_turns > 0 for pair in selected),
    )
    if not selected:
        raise DatasetError(
            f"No pair is left to train on: of {len(pairs)} pairs {counts.held_out} are held out, {counts.disputed} are "
            f"disputed and {counts.too_long} are longer than {recipe.max_length} tokens."
        )
    return Selection(selected, counts)


def _has_support(pair: TokenizedPair, min_support: float | None) -> bool:
    return min_support is None or pair.pair.support is None or pair.pair.support >= min_support


def balance_lengths(pairs: Sequence[TokenizedPair], seed: int) -> list[TokenizedPair]:
    """Leave out pairs at random until the longer completion is chosen as often as the shorter one; order is preserved.

    Length is the easiest feature to learn from preferences (Singhal et al. 2023, "A Long Way to Go"). In balanced pairs
    it does not predict the chosen completion. Pairs of completions with equal length are all included.
    """
    longer_wins = [index for index, pair in enumerate(pairs) if pair.pair.excess_chars > 0]
    shorter_wins = [index for index, pair in enumerate(pairs) if pair.pair.excess_chars < 0]
    majority, minority = sorted((longer_wins, shorter_wins), key=len, reverse=True)
    left_out = set(random.Random(seed).sample(majority, len(majority) - len(minority)))  # noqa: S311 - no secret
    return [pair for index, pair in enumerate(pairs) if index not in left_out]


def held_out_pairs(pairs: Sequence[TokenizedPair], recipe: Recipe, max_pairs: int) -> list[TokenizedPair]:
    """Return the held-out pairs within the length limit; of more than ``max_pairs`` a fixed sample."""
    held_out = [
        pair
        for pair in pairs
        if is_held_out(pair.pair.prompt, recipe.hold_out_percent) and pair.num_tokens <= recipe.max_length
    ]
    num_drawn = min(max_pairs, len(held_out))
    return random.Random(recipe.seed).sample(held_out, num_drawn)  # noqa: S311 - no secret


def watched_pairs(pairs: Sequence[TokenizedPair], recipe: Recipe) -> list[TokenizedPair]:
    """Return the pairs to evaluate during training: a fixed sample of ``eval_pairs`` pairs within the length limit."""
    short_enough = [pair for pair in pairs if pair.num_tokens <= recipe.max_length]
    num_drawn = min(recipe.eval_pairs, len(short_enough))
    return random.Random(recipe.seed).sample(short_enough, num_drawn)  # noqa: S311 - no secret
