"""The selection of the pairs that a run trains on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.data.holdout import is_held_out
from service.errors import DatasetError
from training.pairs import TokenizedPair
from training.preferences import PreferencePair, Review, Vote
from training.recipe import Recipe
from training.selection import balance_lengths, select_pairs, watched_pairs


def pair(prompt: str = "?", *, chosen_chars: int = 1, rejected_chars: int = 1, num_tokens: int = 1) -> TokenizedPair:
    return TokenizedPair(PreferencePair(prompt, "c" * chosen_chars, "r" * rejected_chars), (0,) * num_tokens, (0,))


def test_held_out_prompts_are_never_selected() -> None:
    """No pair of a held-out prompt is selected and no other pair is left out; the counts agree."""
    pairs = [pair(f"prompt {n}") for n in range(100)]
    expected = [pair for pair in pairs if not is_held_out(pair.pair.prompt, 25)]

    selection = select_pairs(pairs, Recipe(hold_out_percent=25))

    assert selection.pairs == expected
    assert 0 < selection.counts.held_out == 100 - len(expected)


def test_long_pairs_are_left_out_and_counted() -> None:
    """A pair's length is that of its longer side, and a long pair is left out, not truncated."""
    pairs = [pair(num_tokens=10), pair(num_tokens=11)]

    selection = select_pairs(pairs, Recipe(max_length=10, hold_out_percent=0))

    assert selection.pairs == pairs[:1]
    assert selection.counts.too_long == 1


def test_only_selected_shortened_pairs_are_counted() -> None:
    """A shortened pair that is still too long does not count."""
    shortened = replace(pair(num_tokens=10), num_dropped_turns=2)
    still_long = replace(pair(num_tokens=11), num_dropped_turns=2)

    selection = select_pairs([pair(), shortened, still_long], Recipe(max_length=10, hold_out_percent=0))

    assert (selection.counts.trained, selection.counts.shortened) == (2, 1)


def test_an_empty_selection_is_an_error_with_the_counts() -> None:
    """The message names the number of pairs by reason."""
    with pytest.raises(DatasetError, match="of 2 pairs 0 are held out, 0 are disputed and 2 are longer than 5 tokens"):
        select_pairs([pair(num_tokens=9)] * 2, Recipe(max_length=5, hold_out_percent=0))


@pytest.mark.parametrize(("num_longer", "num_shorter"), [(7, 3), (3, 7), (4, 4), (5, 0)])
def test_balanced_pairs_do_not_favour_a_length(num_longer: int, num_shorter: int) -> None:
    """Only the surplus is left out; ties and the order are preserved, and a seed always leaves out the same pairs."""
    longer = [pair(f"l{n}", chosen_chars=2) for n in range(num_longer)]
    shorter = [pair(f"s{n}", rejected_chars=2) for n in range(num_shorter)]
    even = [pair("even")]
    pairs = longer + even + shorter

    balanced = balance_lengths(pairs, seed=1)

    num_each = min(num_longer, num_shorter)
    assert sorted(pair.pair.excess_chars for pair in balanced) == [-1] * num_each + [0] + [1] * num_each
    assert balanced == [pair for pair in pairs if pair in balanced] == balance_lengths(pairs, seed=1)


def test_the_watched_pairs_are_a_fixed_sample() -> None:
    """Each run evaluates the same pairs, and none that is too long for training."""
    pairs = [pair(f"p{n}", num_tokens=1 + n) for n in range(20)]
    recipe = Recipe(eval_pairs=5, max_length=10)

    watched = watched_pairs(pairs, recipe)

    assert watched == watched_pairs(pairs, recipe)
    assert len(watched) == 5
    assert all(pair.num_tokens <= 10 for pair in watched)
    assert len(watched_pairs(pairs, Recipe(eval_pairs=50, max_length=10))) == 10


def test_disputed_pairs_are_left_out() -> None:
    """Pairs on which too few annotators agree with the label are left out; pairs without reviews are not."""
    votes: dict[str, tuple[Vote, ...]] = {
        "clear": ("chosen", "chosen", "chosen"),
        "split": ("chosen", "chosen", "rejected"),
        "unknown": (),
    }
    pairs = {
        name: TokenizedPair(
            PreferencePair(name, "c", "r", reviews=tuple(Review(str(n), vote) for n, vote in enumerate(given))),
            (0,),
            (0,),
        )
        for name, given in votes.items()
    }

    selection = select_pairs(list(pairs.values()), Recipe(hold_out_percent=0, min_support=0.75))

    assert selection.pairs == [pairs["clear"], pairs["unknown"]]
    assert (selection.counts.disputed, selection.counts.trained) == (1, 2)
