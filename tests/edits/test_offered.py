"""The edits that the service offers by name: those of the probe, and the words in random order."""

from __future__ import annotations

import time
from collections import Counter
from typing import get_args

import pytest

from service.diagnostics.lexicon import count_style_markers
from service.edits.edits import make_bullets
from service.edits.offered import OFFERED, EditName, edited
from service.edits.phrases import WORDINGS
from service.edits.probe import EDITS, WORDING

ANSWER = "Boil the egg for 7 minutes, not more. Then cool it. Peel it under water."


def test_every_name_has_an_edit() -> None:
    """The names that a request may have are those that have an edit; all but one are edits of the probe."""
    assert set(OFFERED) == set(get_args(EditName))
    assert [name for name, edit in OFFERED.items() if edit not in EDITS] == ["shuffle"]
    assert WORDINGS[2] == WORDING


@pytest.mark.parametrize("name", OFFERED)
def test_an_edit_changes_an_answer_in_the_same_way_each_time(name: EditName) -> None:
    """Every edit changes an answer, gives the same text again, and takes a text that it has made."""
    once = edited(name, ANSWER)

    assert once != ANSWER
    assert edited(name, ANSWER) == once
    assert edited(name, once)


def test_edits_do_what_they_are_called() -> None:
    """Padding adds four sentences of the phrases, hedging hedges each, praise surrounds, shuffling keeps the words."""
    assert sum(sentence in edited("pad", ANSWER) for sentence in WORDING.padding) == 4
    assert edited("pad", ANSWER).startswith("Boil the egg for 7 minutes, not more.")
    assert sum(edited("hedge", ANSWER).count(hedge) for hedge in WORDING.hedges) >= 3
    assert any(edited("praise", ANSWER).endswith(closing) for closing in WORDING.closings)
    assert ANSWER in edited("praise", ANSWER)
    assert OFFERED["bullets"].change is make_bullets
    assert count_style_markers(edited("bullets", ANSWER)).list_items == 4
    assert Counter(edited("shuffle", ANSWER).split()) == Counter(ANSWER.split())


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("unit", [" ", "\n", "a. ", ". \n", "1. ", "**", "a,"])
def test_the_time_is_linear(name: EditName, unit: str) -> None:
    """A text as long as a request may be takes less than a second, whatever it consists of."""
    text = f"x{unit * (131_000 // len(unit))}x"
    begin = time.process_time()

    edited(name, text)

    assert time.process_time() - begin < 1.0
