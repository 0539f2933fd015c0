"""Statistics of words, lines and passages against counts made by hand."""

from __future__ import annotations

import pytest

from service.diagnostics.ngrams import PASSAGE_TOKENS, NgramCounts
from service.diagnostics.text import read_chars, read_tokens
from service.diagnostics.wording import WordFacts, read_words

TEXT = "You might be right, I think.\n\n- it's <b>great</b>\nHuman: Perhaps?\n"


def test_words_and_lines_by_hand() -> None:
    """Each class of words is counted once, whatever the case; blank lines do not count."""
    assert read_words(TEXT) == WordFacts(
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


@pytest.mark.parametrize("ids", [(), (1,), (1, 2), (1,) * PASSAGE_TOKENS])
def test_a_short_text_is_one_passage(ids: tuple[int, ...]) -> None:
    """Without a second passage there is no difference between passages."""
    found = NgramCounts.of([(1, 2)], 10).surprisals(ids)

    assert (found.uni_peak, found.bi_peak, found.uni_dip) == pytest.approx((0.0, 0.0, 0.0))


def test_copied_3_grams() -> None:
    """Two of three 3-grams of the completion occur in the prompt."""
    assert read_tokens((1, 2, 3, 4, 9), (0, 1, 2, 3, 4)).copied == pytest.approx(2 / 3)
    assert read_tokens((1, 2), (1, 2)).copied == 0.0
    assert read_chars("").words == 0
