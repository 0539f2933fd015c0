"""The built-in suite: every set has the property in its name, and is the same for the same seed."""

from __future__ import annotations

import random

import pytest

from export.calibration.hack_sets import Base, HackSet, make_hacks
from export.calibration.hacks import SUITE
from service.records import Message

COMPLETION = "Boil the egg for seven minutes. Then cool it in cold water! Is that clear? Enjoy your breakfast."
PROMPT = (Message("user", "How long should a breakfast egg boil?"),)
BASE = Base(PROMPT, COMPLETION, ["Another answer.", "A third one.", "More."], lambda rng: f"t{rng.randrange(99)} ")
NAMES = [entry.name for entry in SUITE]


def made(name: str, seed: int = 0, base: Base = BASE) -> str:
    (hack,) = make_hacks([base], [entry for entry in SUITE if entry.name == name], seed)
    return hack.exchange.completion_text


@pytest.mark.parametrize("entry", SUITE, ids=NAMES)
def test_every_recipe_works_on_any_text(entry: HackSet) -> None:
    """A recipe accepts empty, one-word and non-English completions and plain prompts, and returns a text."""
    for completion in ("", "one", COMPLETION, "\u4f60\u597d", "\ud800 lone".encode("utf-8", "replace").decode()):
        for prompt in (PROMPT, "Why?", (Message("system", "Be brief."),)):
            base = Base(prompt, completion, ["x", "y"], lambda _: "t ")
            assert entry.recipe(base, random.Random(1)) is not None


def test_a_seed_fixes_every_text() -> None:
    """The suite is reproducible, and a set's texts do not depend on which other sets are made."""
    whole = {hack.kind: hack.exchange.completion_text for hack in make_hacks([BASE], SUITE, 7)}

    assert {name: made(name, 7) for name in NAMES} == whole
    assert any(made(name, 8) != whole[name] for name in NAMES)


def test_shuffling_only_permutes() -> None:
    """Shuffled words are the same words, shuffled characters the same characters."""
    assert sorted(made("shuffled_words").split()) == sorted(COMPLETION.split())
    assert sorted(made("shuffled_chars")) == sorted(COMPLETION)


@pytest.mark.parametrize(
    ("name", "property_holds"),
    [
        ("prompt_echo", lambda text: text == "How long should a breakfast egg boil?"),
        ("no_punct", lambda text: not {*text} & {*".,!?"}),
        ("zalgo", lambda text: len(text) > 2 * len(COMPLETION)),
        ("random_unicode", lambda text: all(ord(letter) > 127 for letter in text)),
        ("chinese", lambda text: sum("\u4e00" <= letter <= "\u9fff" for letter in text) > len(text) / 2),
        ("repeat_phrase", lambda text: max(map(text.count, ("seven", "cool", "clear", "Enjoy"))) >= 6),
        ("md_theater", lambda text: text.startswith("# ") and text.count("\n- ") >= 4),
        ("very_long_concat", lambda text: len(text) > len(COMPLETION) + 10),
        ("truncated", COMPLETION.startswith),
        ("stuffed_prefix", lambda text: text.endswith(COMPLETION)),
    ],
)
def test_a_set_has_the_property_in_its_name(name: str, property_holds: object) -> None:
    """The property after which the set is named holds."""
    assert callable(property_holds)
    assert property_holds(made(name))
