"""Statistics of words, lines and passages against counts made by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from service.diagnostics.ngrams import PASSAGE_TOKENS, NgramCounts
from service.diagnostics.split_text import split_text
from service.diagnostics.text import read_chars
from service.diagnostics.token_facts import PromptTokens, read_tokens
from service.diagnostics.wording import WordFacts, read_words

TEXT = "You might be right, I think.\n\n- it's <b>great</b>\nHuman: Perhaps?\n"


def test_words_and_lines_by_hand() -> None:
    """Each class of words is counted once, whatever the case; blank lines do not count."""
    assert read_words(split_text(TEXT)) == WordFacts(
        words=12,
        second_person=1,
        first_person=1,
        modal=3,
        praise=1,
        function=6,
        sentences=3,
        lead_ins=1,
        idle=1,
        addressed=1,
        questions=1,
        exclamations=0,
        lines=3,
        list_lines=1,
        role_lines=1,
        markup=4,
    )


def test_a_passage_of_odd_tokens_is_seen() -> None:
    """Twelve rare tokens in a text of frequent ones raise its peak, and hardly the mean of a long text."""
    frequent = (1, 2, 3, 4) * 100
    counts = NgramCounts.of([frequent] * 5, 100)

    clean = counts.surprisals(frequent)
    odd = counts.surprisals(frequent[:200] + tuple(range(50, 50 + PASSAGE_TOKENS)) + frequent[200:])

    assert clean.uni_peak == pytest.approx(0.0, abs=1e-9)
    assert odd.uni_peak > 5
    assert odd.bi_peak > 5
    assert odd.uni - clean.uni < 0.5
    assert odd.uni_dip > clean.uni_dip


def test_texts_that_are_read_together_have_the_surprisals_of_each_alone() -> None:
    """Whatever lies beside a text, empty, of one token, short or long, its figures are exactly the same."""
    rng = random.Random(0)
    texts = [tuple(rng.choices(range(50), k=size)) for size in (0, 1, 2, 12, 13, 14, 200, 40, 1, 0, 1500)]
    counts = NgramCounts.of(texts[:8], 50)

    together = counts.surprisals_of(texts)

    assert together == [counts.surprisals(text) for text in texts]
    assert counts.surprisals_of([]) == []
    window = np.array([counts.surprisal((token,))[0] for token in texts[7]])
    passages = [window[begin : begin + PASSAGE_TOKENS].mean() for begin in range(len(window) - PASSAGE_TOKENS + 1)]
    assert together[7].uni_peak == pytest.approx(max(passages) - window.mean())
    assert together[7].uni_dip == pytest.approx(window.mean() - min(passages))


@pytest.mark.parametrize("ids", [(), (1,), (1, 2), (1,) * PASSAGE_TOKENS])
def test_a_short_text_is_one_passage(ids: tuple[int, ...]) -> None:
    """Without a second passage there is no difference between passages."""
    found = NgramCounts.of([(1, 2)], 10).surprisals(ids)

    assert (found.uni_peak, found.bi_peak, found.uni_dip) == pytest.approx((0.0, 0.0, 0.0))


def test_copied_3_grams() -> None:
    """Two of three 3-grams of the completion occur in the prompt."""
    assert read_tokens((1, 2, 3, 4, 9), PromptTokens((0, 1, 2, 3, 4))).copied == pytest.approx(2 / 3)
    assert read_tokens((1, 2), PromptTokens((1, 2))).copied == 0.0
    assert read_tokens((3, 2, 1, 9), PromptTokens((1, 2, 3))).copied == 0.0
    assert read_chars(split_text("")).words == 0
