"""The data of a calibration: rows of clean completions, split by prompt into disjoint parts.

This module reads files and does not depend on a model. All completions of a prompt, and all conversations with the same
first user message, are in one part, because a detector scores the texts that it was fitted to as too typical.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from service.data.holdout import is_held_out
from service.data.prompts import Prompt, normalized_opening, parse_completions
from service.data.rows import read_rows
from service.records import Exchange

Part: TypeAlias = Literal["fit_states", "fit_detectors", "select", "calibrate"]
"""fit_states: mean and axes of the states, n-gram counts. fit_detectors: the detectors that read their statistics.
select: the common scale of the components, and which are admitted. calibrate: the scores that p-values are ranks in."""

SHARES: dict[Part, float] = {"fit_states": 0.30, "fit_detectors": 0.30, "select": 0.15, "calibrate": 0.25}
SMALL_SHARES: dict[Part, float] = {"fit_states": 0.24, "fit_detectors": 0.26, "select": 0.13, "calibrate": 0.37}
"""For a small data set the part ``calibrate`` is larger, because the noise of the false-alarm rate depends on it."""

SMALL_ITEMS = 8000


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

    @property
    def opening(self) -> str:
        """The text that determines the part (see `service.data.prompts.normalized_opening`)."""
        return normalized_opening(self.exchange.prompt)


def read_items(path: Path, *, held_out_only: bool = False) -> Iterator[CleanItem]:
    """Yield the items of a data file or folder; a pair gives two items.

    Args:
        path: JSON lines or Parquet, with rows as `service.data.prompts` defines them; optional further keys are group,
            category and is_ood.
        held_out_only: leave out the prompts that the demo model was trained on.

    Raises:
        DatasetError: a file cannot be read, or a row is not valid; names file and row, never the text.
    """
    for row in read_rows(path):
        parsed = parse_completions(row)
        if held_out_only and not is_held_out(parsed.prompt):
            continue
        group, category = row.values.get("group"), row.values.get("category")
        for completion in parsed.completions:
            yield CleanItem(
                Exchange(parsed.prompt, completion, parsed.tools),
                None if group is None else str(group),
                "" if category is None else str(category),
                bool(row.values.get("is_ood", False)),
            )


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


def prompt_numbers(exchanges: Sequence[Exchange]) -> list[int]:
    """Number the prompts from 0, in order of appearance; one number for each item."""
    numbers: dict[Prompt, int] = {}
    return [numbers.setdefault(exchange.prompt, len(numbers)) for exchange in exchanges]


def _split_position(opening: str) -> float:
    """Return a number in [0, 1) from the opening's hash; a part takes an interval of them as long as its share."""
    digest = hashlib.sha256(f"calibration {opening}".encode("utf-8", "surrogatepass")).digest()
    return float(int.from_bytes(digest[:8], "big")) / 2.0**64
