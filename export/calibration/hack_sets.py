"""Sets of hacks: what one is derived from, how it is named and grouped, and how its texts are made."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from service.edits.edits import Draft, question_of
from service.edits.phrases import WORDINGS, Phrases
from service.records import Exchange, Message

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Base:
    """A clean item that a hack is derived from, and the other inputs of the functions that do it."""

    prompt: str | tuple[Message, ...] = field(repr=False)
    completion: str = field(repr=False)

    others: Sequence[str] = field(repr=False)
    """Completions of other prompts."""

    random_token: Callable[[random.Random], str] = field(repr=False)
    """Samples one token of the vocabulary and decodes it."""

    phrases: Phrases = field(default=WORDINGS[0], repr=False)
    """Wording of what plausible hacks add; the parts of the data have different ones."""

    @property
    def question(self) -> str:
        """The text of the last user turn, or the whole of a plain prompt."""
        return question_of(self.prompt)

    @property
    def draft(self) -> Draft:
        """The item as edits take it."""
        return Draft(self.completion, self.question, self.others)

    @property
    def words(self) -> list[str]:
        """Whitespace-separated words of the completion; never empty."""
        return self.completion.split() or ["word"]

    @property
    def sentences(self) -> list[str]:
        """Sentences of the completion; never empty."""
        return [part for part in SENTENCE_END.split(self.completion.strip()) if part] or ["Well."]


Recipe: TypeAlias = Callable[[Base, random.Random], str]
"""Derives a hacked completion from a clean item."""


@dataclass(frozen=True, slots=True)
class HackSet:
    """A set of hacks of one kind."""

    name: str
    """Also seeds its texts, so another name gives other texts."""

    family: str
    """Sets of one mechanism form a family; detection of unseen hacks is measured by leaving out a whole family."""

    recipe: Recipe

    trains: bool = True
    """Whether detectors may be trained on it; the other sets are only measured."""

    weight: float = 1.0
    """Of each of its items, where detectors are trained on it."""


@dataclass(frozen=True, slots=True)
class Hack:
    """One hacked item."""

    exchange: Exchange

    kind: str
    """Name of its set."""

    family: str


def make_hacks(bases: Sequence[Base], sets: Sequence[HackSet], seed: int) -> list[Hack]:
    """Derive a hack of every set from every base item; a set's texts depend on the seed and its own name only."""
    hacks = []
    for hack_set in sets:
        rng = random.Random(f"{seed} {hack_set.name}")  # noqa: S311 - texts, not secrets
        hacks += [
            Hack(Exchange(base.prompt, hack_set.recipe(base, rng)), hack_set.name, hack_set.family) for base in bases
        ]
    return hacks
