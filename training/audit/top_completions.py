"""The completions with the highest rewards, with what is striking about them: what a policy would be pushed towards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import percentileofscore

from service.diagnostics.text import CharFacts, read_chars
from service.records import Message
from training.audit.scored_pairs import Completions, LengthUnit

NUM_SHOWN = 10
LONG_PERCENTILE = 90
SHORT_PERCENTILE = 10
REPETITIVE_ZLIB_RATIO = 0.4
"""Compressed by uncompressed size below which a text repeats itself; ordinary prose lies about 0.5 to 0.7."""

MIN_CHARS_FOR_REPETITION = 200
MANY_LIST_ITEMS = 5


@dataclass(frozen=True, slots=True)
class TopCompletion:
    """One of the highest rewards. ``side``: whether people chose it. ``length_percentile``: among all completions.

    ``tells``: what is striking, in words. ``prompt``, ``completion``: None where texts are to be left out.
    """

    rank: int
    id: str
    source: str
    reward: float
    side: str
    length: float
    length_percentile: float
    tells: Sequence[str]
    prompt: Sequence[Message] | None = field(default=None, repr=False)
    completion: str | None = field(default=None, repr=False)


def top_completions(completions: Completions, unit: LengthUnit, *, hide_texts: bool) -> list[TopCompletion]:
    """Return the ``NUM_SHOWN`` completions with the highest rewards, highest first."""
    order = np.argsort(-completions.rewards, kind="stable")[:NUM_SHOWN]
    return [
        _describe(completions, int(place), rank, unit, hide_texts=hide_texts)
        for rank, place in enumerate(order, start=1)
    ]


def _describe(completions: Completions, place: int, rank: int, unit: LengthUnit, *, hide_texts: bool) -> TopCompletion:
    pair, text, length = completions.pairs[place], completions.texts[place], completions.lengths[place]
    percentile = float(percentileofscore(completions.lengths, length, kind="mean"))
    prompt = (Message("user", pair.prompt),) if isinstance(pair.prompt, str) else pair.prompt
    return TopCompletion(
        rank=rank,
        id=pair.id,
        source=pair.source,
        reward=float(completions.rewards[place]),
        side=completions.sides[place],
        length=float(length),
        length_percentile=percentile,
        tells=[*_length_tells(percentile, length, unit), *style_tells(read_chars(text))],
        prompt=None if hide_texts else prompt,
        completion=None if hide_texts else text,
    )


def _length_tells(percentile: float, length: float, unit: LengthUnit) -> list[str]:
    if percentile >= LONG_PERCENTILE:
        return [f"among the longest tenth ({length:.0f} {unit})"]
    if percentile <= SHORT_PERCENTILE:
        return [f"among the shortest tenth ({length:.0f} {unit})"]
    return []


def style_tells(facts: CharFacts) -> list[str]:
    """Return what is striking about a text, in words; nothing for plain prose."""
    tells = facts.markers
    counted = {
        "heading": tells.headers,
        "bold span": tells.bold,
        "emoji character": tells.emoji,
        "hedge": tells.hedges,
        "flattering phrase": tells.flattery,
        "list item": tells.list_items if tells.list_items >= MANY_LIST_ITEMS else 0,
    }
    found = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counted.items() if count]
    if facts.chars >= MIN_CHARS_FOR_REPETITION and facts.zlib_ratio < REPETITIVE_ZLIB_RATIO:
        found.append(f"repeats itself (compresses to {facts.zlib_ratio:.0%})")
    return found
