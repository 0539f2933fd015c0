"""How much of a completion the completions of other prompts share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.lexicon import count_style_markers
from service.diagnostics.monitors.shared_phrases import NUM_PROMPTS, SHARED, RecentPhrases
from service.diagnostics.wording import Wording, read_wording

NAMES = [statistic.name for statistic in SHARED]


def wording(text: str, prompt: int) -> Wording:
    return read_wording(text, "", count_style_markers(text), prompt)


def own_words(prompt: int) -> str:
    """Six words that no other prompt's completion has."""
    letters = "".join(chr(97 + digit) for digit in divmod(prompt, 26))
    return " ".join(f"{letters}{word}" for word in ("ax", "bx", "cx", "dx", "ex", "fx"))


def compare(phrases: RecentPhrases, completions: list[Wording]) -> NDArray[np.float64]:
    """Compare completions of one prompt."""
    return phrases.compare(completions, np.zeros(len(completions), np.int64))


def fed(num_prompts: int, text: str = "") -> RecentPhrases:
    """The phrases of so many prompts, each with words of its own and the same ending."""
    phrases = RecentPhrases()
    for prompt in range(num_prompts):
        compare(phrases, [wording(f"{own_words(prompt)} {text}", prompt)])
    return phrases


def shared(phrases: RecentPhrases, text: str, prompt: int, name: str) -> float:
    return float(compare(phrases, [wording(text, prompt)])[0, NAMES.index(name)])


def test_nothing_is_known_until_enough_prompts_were_seen() -> None:
    """The figures begin when there are as many prompts as later, so that they do not rise by themselves."""
    phrases = fed(NUM_PROMPTS - 1)

    assert np.isnan(compare(phrases, [wording("a b c d e", 1000)])).all()
    assert np.isfinite(compare(phrases, [wording("a b c d e", 1001)])).all()


def test_what_other_prompts_share_is_counted() -> None:
    """A phrase that other prompts' completions have counts, by its place and by the classes of its words."""
    phrases = fed(NUM_PROMPTS, "you might well say that")

    text = "quite other words here you might well say that"
    assert shared(phrases, text, 900, "shared_phrases") == 100 * (2 / 6)
    assert shared(phrases, text, 901, "shared_endings") == 100.0
    assert shared(phrases, text, 902, "shared_openings") == 100.0  # prompts 900 and 901 began like this
    assert shared(fed(NUM_PROMPTS, "you might well say that"), text, 1, "shared_openings") == 0.0
    assert shared(fed(NUM_PROMPTS, "you might well say that"), text, 1, "widely_shared_phrases_with_hedging_words") > 30
    assert shared(fed(NUM_PROMPTS), text, 1, "shared_phrases") == 0.0


def test_answers_to_one_prompt_are_not_compared() -> None:
    """A prompt that comes again, and siblings within a request, share nothing with themselves."""
    phrases = fed(NUM_PROMPTS)
    text = "every word of this comes again"

    assert (compare(phrases, [wording(text, 900), wording(text, 900)]) == 0.0).all()
    assert shared(phrases, text, 900, "shared_phrases") == 0.0
    assert shared(phrases, text, 901, "shared_phrases") == 100.0


def test_old_prompts_are_forgotten() -> None:
    """Only the latest prompts are compared with, and memory does not grow."""
    phrases = fed(1, "you might well say that")
    for prompt in range(1, 3 * NUM_PROMPTS):
        compare(phrases, [wording(own_words(prompt), prompt)])

    assert shared(phrases, "you might well say that", 5000, "shared_phrases") == 0.0
    assert phrases._counts.sum() == 3 * (NUM_PROMPTS - 1) + 2
    assert len(phrases._of_prompt) == NUM_PROMPTS


def test_an_empty_completion_shares_nothing() -> None:
    """A completion that is too short for a phrase shares none."""
    assert (compare(fed(NUM_PROMPTS), [wording("No.", 900)]) == 0.0).all()


def test_a_batch_is_compared_at_once() -> None:
    """Each completion of a batch gets the figures that it gets alone; of a large batch the latest prompts remain."""
    texts = ["you might well say that", "No.", "quite other words here you might well say that", "a b c d e"]
    batch = [wording(text, 800 + number // 2) for number, text in enumerate(texts)]
    alone = np.concatenate([compare(fed(NUM_PROMPTS, texts[0]), [entry]) for entry in batch])
    phrases = fed(NUM_PROMPTS, texts[0])

    together = phrases.compare(batch, np.array([0, 0, 1, 1]))
    many = [wording(own_words(number), number) for number in range(600)]
    phrases.compare(many, np.arange(600))

    assert together.tolist() == alone.tolist()
    assert (compare(phrases, [wording(own_words(599), 5000)])[:, 0] == 100.0).all()
    assert (compare(phrases, [wording(own_words(100), 5001)])[:, 0] == 0.0).all()
