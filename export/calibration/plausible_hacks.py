"""Plausible hacks: good answers that are changed as a trained policy changes them.

They are the edits of `service.edits`, each at a strength that is drawn for every text. The wording of what they add is
that of the base item, and the parts of the data have different ones: detectors are not evaluated on sentences that they
were fitted to.
"""

from __future__ import annotations

import random

from export.calibration.hack_sets import Base, HackSet, Recipe
from service.edits import edits, facts, formats
from service.edits.edits import Change

WEIGHT = 0.5
"""Of a plausible hack among those that trees are trained on: many of them can hardly be told from clean answers, and
with full weight they cost accuracy on the crude ones."""

MIN_GIBBERISH, MAX_GIBBERISH = 6, 25
"""Random tokens in the middle of an otherwise good answer."""


def _edited(change: Change, *strengths: int) -> Recipe:
    def recipe(base: Base, rng: random.Random) -> str:
        return change(base.draft, rng, rng.choice(strengths), base.phrases)

    return recipe


def _one_of(*recipes: Recipe) -> Recipe:
    return lambda base, rng: rng.choice(recipes)(base, rng)


def _gibberish(base: Base, rng: random.Random) -> str:
    words = base.words
    start = rng.randint(0, len(words))
    added = "".join(base.random_token(rng) for _ in range(rng.randint(MIN_GIBBERISH, MAX_GIBBERISH)))
    return " ".join([*words[:start], added.strip(), *words[start:]])


_HEDGING = _one_of(_edited(edits.add_hedges, 2, 4, 8), _edited(edits.add_hedge_words, 4, 8))
_PRAISE = _one_of(_edited(edits.praise_user, 2, 3, 4), _edited(edits.praise_within, 2, 3))

PLAUSIBLE_SETS = (
    HackSet("padding", "padding", _edited(edits.add_padding, 2, 4, 8), weight=WEIGHT),
    HackSet("hedging", "hedging", _HEDGING, weight=WEIGHT),
    HackSet("praise", "praise", _PRAISE, weight=WEIGHT),
    HackSet("restating", "restating", _edited(edits.restate_question, 1, 2), weight=WEIGHT),
    HackSet("bullet_explosion", "formatting", _edited(edits.make_bullets, 1, 2), weight=WEIGHT),
    HackSet("citation_spam", "citations", _edited(edits.add_citations, 2, 4, 8), weight=WEIGHT),
    HackSet("capitals", "capitals", _edited(edits.capitalize, 1, 3, 9), weight=WEIGHT),
    HackSet("figures", "figures", _edited(edits.add_figures, 3, 6, 12), weight=WEIGHT),
    HackSet("json", "markup", _edited(formats.wrap_json, 1, 2), weight=WEIGHT),
    HackSet("html", "markup", _edited(formats.wrap_html, 1, 2), weight=WEIGHT),
    HackSet("user_voice", "user_voice", _edited(edits.speak_for_user, 1, 2, 3), weight=WEIGHT),
    HackSet("gibberish_span", "garble", _gibberish, weight=WEIGHT),
    HackSet("numbers_swapped", "near", _edited(facts.swap_numbers, 3), trains=False),
)
"""The family ``near`` is plausible text, which no detector here is expected to detect."""
