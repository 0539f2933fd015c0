"""How much of a completion the completions of other prompts share."""

from __future__ import annotations

import numpy as np
import pytest

from service.diagnostics.monitors.shared_phrases import SHARED, WIDELY, SharedPhrases, share_phrases
from service.diagnostics.phrasing import Wording
from service.diagnostics.text import wording_of
from service.records import Exchange

NAMES = [statistic.name for statistic in SHARED]


def wording(text: str) -> Wording:
    return wording_of(Exchange("", text))


def compare(*texts: str, prompts: list[int] | None = None) -> SharedPhrases:
    """Compare completions; each has a prompt of its own unless their prompts are given."""
    numbers = list(range(len(texts))) if prompts is None else prompts
    return share_phrases([wording(text) for text in texts], np.array(numbers, np.int64))


def values(found: SharedPhrases, name: str) -> list[float]:
    return [float(value) for value in found.values[:, NAMES.index(name)]]


def test_what_other_prompts_share_is_counted() -> None:
    """A phrase counts that another prompt's completion has, by its place in the answer."""
    found = compare("you might well say that", "other words you might well say", "nothing of this is there")

    assert values(found, "shared_phrases") == [50.0, pytest.approx(100 / 3), 0.0]
    assert values(found, "shared_openings") == [100.0, 0.0, 0.0]
    assert values(found, "shared_endings") == [0.0, 100.0, 0.0]
    assert values(found, "widely_shared_phrases") == [0.0] * 3


def test_what_many_share_is_widely_shared() -> None:
    """A phrase that enough other prompts share is widely shared, and has the kinds of its words."""
    texts = ["you might say that"] * (WIDELY + 1)

    assert values(compare(*texts), "widely_shared_phrases") == [100.0] * len(texts)
    assert values(compare(*texts), "widely_shared_endings") == [100.0] * len(texts)
    assert values(compare(*texts), "widely_shared_phrases_with_hedging_words") == [100.0] * len(texts)
    assert values(compare(*texts), "widely_shared_phrases_with_praise_words") == [0.0] * len(texts)
    assert values(compare(*texts[1:]), "widely_shared_phrases") == [0.0] * WIDELY


def test_answers_to_one_prompt_are_not_compared() -> None:
    """Completions of one prompt share nothing with each other, and count as one for the others."""
    texts = ["every word of this comes again"] * 6

    assert not compare(*texts, prompts=[0] * 6).values.any()
    found = compare(*texts, prompts=[0, 0, 0, 0, 1, 1])
    assert values(found, "shared_phrases") == [100.0] * 6
    assert values(found, "widely_shared_phrases") == [0.0] * 6


@pytest.mark.parametrize("text", ["", "No.", "\u4f60\u597d"])
def test_a_completion_without_phrases_shares_nothing(text: str) -> None:
    """A completion that is too short for a phrase has figures, too: zeros."""
    assert not compare(text).values.any()
    assert values(compare("a b c d", text, "a b c d"), "shared_phrases") == [100.0, 0.0, 100.0]
    assert compare().values.shape == (0, len(SHARED))


def test_what_a_prompt_lends_is_what_the_others_lose_without_it() -> None:
    """The jackknife: for each prompt, the sum of the others' figures less that sum without it."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcd"), rng.integers(3, 9))) for _ in range(40)]
    prompts = np.sort(rng.integers(25, size=40))
    prompts = np.unique(prompts, return_inverse=True)[1]
    found = share_phrases([wording(text) for text in texts], prompts)

    for prompt in range(int(prompts.max()) + 1):
        others = prompts != prompt
        remaining = [wording(text) for text, is_other in zip(texts, others, strict=True) if is_other]
        without = share_phrases(remaining, np.unique(prompts[others], return_inverse=True)[1])
        lost = found.values[others].sum(axis=0) - without.values.sum(axis=0)
        assert found.lent[prompt] == pytest.approx(lost)


def test_the_standard_error_is_that_of_repeated_batches() -> None:
    """The estimated variance is at least that over batches (Efron and Stein, 1981); without what is lent it is less."""
    rng = np.random.default_rng(1)
    vocabulary = np.array(list("abcdefgh"))
    means, with_lent, without = [], [], []
    for _ in range(150):
        found = share_phrases([wording(" ".join(rng.choice(vocabulary, 6))) for _ in range(60)], np.arange(60))
        values_of = found.values[:, 0]
        influence = values_of - values_of.mean()
        lent = found.lent[:, 0] - found.lent[:, 0].mean()
        means.append(values_of.mean())
        with_lent.append(((influence + lent) ** 2).sum() / 60**2)
        without.append((influence**2).sum() / 60**2)

    assert 0.9 * np.var(means) < np.mean(with_lent) < 2.5 * np.var(means)
    assert np.mean(without) < 0.6 * np.var(means)
