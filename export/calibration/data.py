"""The data of a calibration: rows of clean completions, split by prompt into disjoint parts.

This module reads files and does not depend on a model. All completions of a prompt, and all conversations with the same
first user message, are in one part, because a detector scores the texts that it was fitted to as too typical.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from service.data.holdout import is_held_out
from service.data.prompts import Prompt, normalized_opening
from service.data.reading import Tell, read_examples
from service.data.rows import Row
from service.errors import CalibrationError, DatasetError
from service.records import Exchange

Part: TypeAlias = Literal["fit_states", "fit_detectors", "select", "calibrate"]
"""fit_states: mean and axes of the states, n-gram counts. fit_detectors: the detectors that read their statistics.
select: the common scale of the components, and which are admitted. calibrate: the scores that p-values are ranks in."""

SHARES: dict[Part, float] = {"fit_states": 0.30, "fit_detectors": 0.30, "select": 0.15, "calibrate": 0.25}
SMALL_SHARES: dict[Part, float] = {"fit_states": 0.24, "fit_detectors": 0.26, "select": 0.13, "calibrate": 0.37}
"""For a small data set the part ``calibrate`` is larger, because the noise of the false-alarm rate depends on it."""

SMALL_ITEMS = 8000

_FLAGS = {"true": True, "1": True, "false": False, "0": False}
MIN_PART_ITEMS = 60
"""Items that each part needs: below, the tail of its distribution is hardly seen."""

MIN_TEXTS = 60
"""Different completions that a calibration needs."""

ENOUGH_ITEMS = 650
"""With as many items of different prompts the smallest part (13 percent) has `MIN_PART_ITEMS` with 99 % certainty."""


@dataclass(frozen=True, slots=True)
class CleanItem:
    """A completion that counts as normal, or an item of test data."""

    exchange: Exchange = field(repr=False)

    group: str | None = None
    """Identifies the completions that were sampled together."""

    category: str = ""
    """Category of test data; empty otherwise."""

    is_ood: bool = False
    """Whether an item of test data should be detected."""

    pair: int | None = None
    """Number of the preference pair that it belongs to; None for a row of one completion."""

    is_chosen: bool = False
    """Whether it is the chosen completion of its pair."""

    @property
    def opening(self) -> str:
        """The text that determines the part (see `service.data.prompts.normalized_opening`)."""
        return normalized_opening(self.exchange.prompt)


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """All items of one call of the command."""

    items: Sequence[CleanItem] = field(repr=False)
    """The items to calibrate on; none where an existing calibration is tested."""

    test_items: Sequence[CleanItem] = field(repr=False)


def read_items(path: Path, *, held_out_only: bool = False, tell: Tell | None = None) -> Iterator[CleanItem]:
    """Yield the items of a data file, a folder or a glob pattern; a pair gives two items.

    Args:
        path: rows as `service.data.prompts` defines them; optional further keys are group, category and is_ood.
        held_out_only: leave out the prompts that the demo model was trained on.
        tell: called with what was found in each file, see `service.data.reading.Reading`.

    Raises:
        DatasetError: a file cannot be read, or a row is not valid; names file and row, never the text.
    """
    for number, (row, parsed) in enumerate(read_examples(path, tell=tell)):
        if held_out_only and not is_held_out(parsed.prompt):
            continue
        group, category = row.values.get("group"), row.values.get("category")
        is_pair = len(parsed.completions) > 1
        for index, exchange in enumerate(parsed.exchanges()):
            yield CleanItem(
                exchange,
                None if group is None else str(group),
                "" if category is None else str(category),
                _parse_flag("is_ood", row),
                number if is_pair else None,
                is_pair and index == 0,
            )


def _parse_flag(key: str, row: Row) -> bool:
    value = row.values.get(key) or False
    flag = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else value  # a field of a CSV file is a text
    if not isinstance(flag, bool | int):
        raise DatasetError(f'{row.location}: "{key}" must be true or false.')
    return bool(flag)


def sample_prompts(items: Sequence[CleanItem], max_items: int, seed: int) -> list[CleanItem]:
    """Return about that many items, of prompts sampled at random; completions of one prompt stay together."""
    openings = list(dict.fromkeys(item.opening for item in items))
    random.Random(seed).shuffle(openings)  # noqa: S311 - a choice of items, not a secret
    sampled = set(openings[: max(1, round(len(openings) * max_items / len(items)))])
    return [item for item in items if item.opening in sampled]


def split(items: Sequence[CleanItem]) -> dict[Part, list[CleanItem]]:
    """Split the items into the parts by a hash of their prompt's opening."""
    shares = SMALL_SHARES if len(items) < SMALL_ITEMS else SHARES
    parts: dict[Part, list[CleanItem]] = {part: [] for part in shares}
    for item in items:
        position = _split_position(item.opening)
        for part, share in shares.items():
            position -= share
            if position < 0:
                parts[part].append(item)
                break
        else:
            parts["calibrate"].append(item)
    return parts


def require_enough(items: Sequence[CleanItem], name: str) -> None:
    """Check that every part has `MIN_PART_ITEMS` items and that they vary, before a model is loaded.

    Args:
        items: the items of a calibration.
        name: of the data, for the message.

    Raises:
        CalibrationError: a part has fewer, or nearly all are the same text; the message gives the completions that
            there are and that are needed.
    """
    num_texts = len({item.exchange.completion_text for item in items})
    smallest = min(map(len, split(items).values()))
    if smallest >= MIN_PART_ITEMS and num_texts < MIN_TEXTS:
        raise CalibrationError(
            f"{name} has {len(items)} completions but only {num_texts} different ones; at least {MIN_TEXTS} are "
            "needed, since a calibration describes how completions vary."
        )
    if smallest >= MIN_PART_ITEMS:
        return
    num_prompts = len({item.opening for item in items})
    raise CalibrationError(
        f"{name} has {len(items)} completions of {num_prompts} prompts, which is too few: a calibration needs about "
        f"{ENOUGH_ITEMS} completions, of as many prompts as possible (they are split by prompt into {len(SHARES)} "
        f"parts, each with at least {MIN_PART_ITEMS}; the smallest has {smallest})."
    )


def prompt_numbers(exchanges: Sequence[Exchange]) -> list[int]:
    """Number the prompts from 0, in order of appearance; one number for each item."""
    numbers: dict[Prompt, int] = {}
    return [numbers.setdefault(exchange.prompt, len(numbers)) for exchange in exchanges]


def _split_position(opening: str) -> float:
    """Return a number in [0, 1) from the opening's hash; a part takes an interval of them as long as its share."""
    digest = hashlib.sha256(f"calibration {opening}".encode("utf-8", "surrogatepass")).digest()
    return float(int.from_bytes(digest[:8], "big")) / 2.0**64
