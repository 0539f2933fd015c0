"""Which pairs a run trains on, and what became of the others: held out, disputed, too long, a surplus of long winners.

Pure: pairs and a recipe in, pairs and counts out.
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
    """What became of the pairs that were read; all but the last add up to them.

    ``disputed``: left out because too few reviewers chose the chosen one. ``shortened``: of the trained pairs those
    whose prompt lost its oldest turns.
    """

    held_out: int
    too_long: int
    unbalanced: int
    trained: int
    disputed: int = 0
    shortened: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """The pairs that training may see, in the order in which they came, and the counts of all."""

    pairs: list[TokenizedPair]
    counts: PairCounts


def select_pairs(pairs: Sequence[TokenizedPair], recipe: Recipe) -> Selection:
    """Leave out the pairs that the recipe leaves out.

    Raises:
        DatasetError: no pair is left.
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
        shortened=sum(pair.num_dropped_turns > 0 for pair in selected),
    )
    if not selected:
        raise DatasetError(
            f"No pair is left to train on: of {len(pairs)} pairs {counts.held_out} are held out, {counts.disputed} are "
            f"disputed and {counts.too_long} are longer than {recipe.max_length} tokens."
        )
    return Selection(selected, counts)


def _has_support(pair: TokenizedPair, least: float | None) -> bool:
    return least is None or pair.pair.support is None or pair.pair.support >= least


def balance_lengths(pairs: Sequence[TokenizedPair], seed: int) -> list[TokenizedPair]:
    """Leave pairs out at random until the longer completion wins as often as the shorter one; the order is kept.

    Length is the easiest thing to learn from preferences (Singhal et al. 2023, "A Long Way to Go"). In balanced pairs
    it does not tell which completion was chosen. Completions of equal length all stay.
    """
    longer_wins = [index for index, pair in enumerate(pairs) if pair.pair.excess_chars > 0]
    shorter_wins = [index for index, pair in enumerate(pairs) if pair.pair.excess_chars < 0]
    majority, minority = sorted((longer_wins, shorter_wins), key=len, reverse=True)
    left_out = set(random.Random(seed).sample(majority, len(majority) - len(minority)))  # noqa: S311 - no secret
    return [pair for index, pair in enumerate(pairs) if index not in left_out]


def watched_pairs(pairs: Sequence[TokenizedPair], recipe: Recipe) -> list[TokenizedPair]:
    """Return the pairs to watch while training: a fixed draw of at most ``eval_pairs`` within the length limit."""
    short_enough = [pair for pair in pairs if pair.num_tokens <= recipe.max_length]
    num_drawn = min(recipe.eval_pairs, len(short_enough))
    return random.Random(recipe.seed).sample(short_enough, num_drawn)  # noqa: S311 - no secret
