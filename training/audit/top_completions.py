"""The completions with the highest rewards and their conspicuous properties: what a policy is optimised towards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import percentileofscore

from service.diagnostics.split_text import split_text
from service.diagnostics.text import CharFacts, read_chars
from service.records import Message
from training.audit.scored_pairs import Completions, LengthUnit

NUM_SHOWN = 10
LONG_PERCENTILE = 90
SHORT_PERCENTILE = 10
REPETITIVE_ZLIB_RATIO = 0.4
"""Compressed size divided by uncompressed size, below which a text counts as repetitive; prose has about 0.5 to 0.7."""

MIN_CHARS_FOR_REPETITION = 200
MANY_LIST_ITEMS = 5


@dataclass(frozen=True, slots=True)
class TopCompletion:
    """A completion with one of the highest rewards."""

    rank: int
    """From 1 for the highest reward."""

    id: str
    source: str
    reward: float

    side: str
    """"chosen", "rejected", or "both" where it was chosen in one pair and rejected in another."""

    length: float
    """In the unit of the scored pairs."""

    length_percentile: float
    """Among all completions."""

    remarks: Sequence[str]
    """Conspicuous properties of length and style, in words."""

    prompt: Sequence[Message] | None = field(default=None, repr=False)
    """None where texts are left out."""

    completion: str | None = field(default=None, repr=False)
    """None where texts are left out."""


def top_completions(completions: Completions, unit: LengthUnit, *, hide_texts: bool) -> list[TopCompletion]:
    """Return the ``NUM_SHOWN`` completions with the highest rewards, highest first."""
    order = np.argsort(-completions.rewards, kind="stable")[:NUM_SHOWN]
    return [
        _describe(completions, int(index), rank, unit, hide_texts=hide_texts)
        for rank, index in enumerate(order, start=1)
    ]


def _describe(completions: Completions, index: int, rank: int, unit: LengthUnit, *, hide_texts: bool) -> TopCompletion:
    pair, text, length = completions.pairs[index], completions.texts[index], completions.lengths[index]
    percentile = float(percentileofscore(completions.lengths, length, kind="mean"))
    prompt = (Message("user", pair.prompt),) if isinstance(pair.prompt, str) else pair.prompt
    return TopCompletion(
        rank=rank,
        id=pair.id,
        source=pair.source,
        reward=float(completions.rewards[index]),
        side=completions.sides[index],
        length=float(length),
        length_percentile=percentile,
        remarks=[*_length_remarks(percentile, length, unit), *style_remarks(read_chars(split_text(text)))],
        prompt=None if hide_texts else prompt,
        completion=None if hide_texts else text,
    )


def _length_remarks(percentile: float, length: float, unit: LengthUnit) -> list[str]:
    if percentile >= LONG_PERCENTILE:
        return [f"among the longest tenth ({length:.0f} {unit})"]
    if percentile <= SHORT_PERCENTILE:
        return [f"among the shortest tenth ({length:.0f} {unit})"]
    return []


def style_remarks(facts: CharFacts) -> list[str]:
    """Return the conspicuous style markers of a text in words; none for plain prose."""
    markers = facts.markers
    counted = {
        "heading": markers.headers,
        "bold span": markers.bold,
        "emoji character": markers.emoji,
        "hedge": markers.hedges,
        "flattering phrase": markers.flattery,
        "list item": markers.list_items if markers.list_items >= MANY_LIST_ITEMS else 0,
    }
    found = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counted.items() if count]
    if facts.chars >= MIN_CHARS_FOR_REPETITION and facts.zlib_ratio < REPETITIVE_ZLIB_RATIO:
        found.append(f"repetitive (compresses to {facts.zlib_ratio:.0%})")
    return found
