"""The data of a calibration: rows of clean completions, split by prompt into parts that may not see each other.

It knows files and prompts, no model. Completions of one prompt never come apart, and neither do conversations that open
alike, since what a detector was fitted to looks far too typical to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from service.data.holdout import is_held_out
from service.data.rows import Row, read_rows
from service.errors import DatasetError
from service.records import Exchange, Message

Part: TypeAlias = Literal["fit_states", "fit_detectors", "select", "calibrate"]
"""fit_states: mean and axes of the states, n-gram counts. fit_detectors: the detectors that read their statistics.
select: the common scale of the components, and which are admitted. calibrate: the scores that p-values are ranks in."""

SHARES: dict[Part, float] = {"fit_states": 0.30, "fit_detectors": 0.30, "select": 0.15, "calibrate": 0.25}
SMALL_SHARES: dict[Part, float] = {"fit_states": 0.24, "fit_detectors": 0.26, "select": 0.13, "calibrate": 0.37}
"""Of a small data set the p-values get more: the noise of the false-alarm rate depends on their part alone."""

SMALL_ITEMS = 8000


@dataclass(frozen=True, slots=True)
class CleanItem:
    """A completion of the kind that is to count as normal. ``category``: of test data, else empty."""

    exchange: Exchange = field(repr=False)
    group: str | None = None
    category: str = ""
    is_ood: bool = False

    @property
    def opening(self) -> str:
        """What decides the part: the first user message, its words in lower case."""
        prompt = self.exchange.prompt
        if isinstance(prompt, str):
            text = prompt
        else:
            text = next((turn.content for turn in prompt if turn.role == "user"), prompt[0].content)
        return " ".join(text.casefold().split())


def read_items(path: Path, *, held_out_only: bool = False) -> Iterator[CleanItem]:
    """Yield the items of a data file or folder: rows with a completion, or pairs with ``chosen`` and ``rejected``.

    Args:
        path: JSON lines or Parquet. Keys: prompt; completion (or response), or chosen and rejected; optional group,
            category and is_ood.
        held_out_only: leave out the prompts that the demo model was trained on.

    Raises:
        DatasetError: a file cannot be read, or a row is neither; names the place, never the text.
    """
    for row in read_rows(path):
        prompt = _read_prompt(row)
        if held_out_only and not is_held_out(prompt):
            continue
        values = row.values
        if isinstance(values.get("chosen"), str) and isinstance(values.get("rejected"), str):
            completions = [values["chosen"], values["rejected"]]
        else:
            completions = [values.get("completion", values.get("response"))]
        if not all(isinstance(completion, str) for completion in completions):
            raise DatasetError(f'{row.place}: a row has "completion", or "chosen" and "rejected", as strings.')
        group, category = values.get("group"), values.get("category")
        for completion in completions:
            yield CleanItem(
                Exchange(prompt, completion),
                None if group is None else str(group),
                "" if category is None else str(category),
                bool(values.get("is_ood", False)),
            )


def split(items: Sequence[CleanItem]) -> dict[Part, list[CleanItem]]:
    """Share the items out over the parts by a hash of how their prompt opens."""
    shares = SMALL_SHARES if len(items) < SMALL_ITEMS else SHARES
    parts: dict[Part, list[CleanItem]] = {part: [] for part in shares}
    for item in items:
        place = _place(item.opening)
        for part, share in shares.items():
            place -= share
            if place < 0:
                parts[part].append(item)
                break
        else:
            parts["calibrate"].append(item)
    return parts


def prompt_numbers(exchanges: Sequence[Exchange]) -> list[int]:
    """Number the prompts from 0, in order of appearance; one number for each item."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(exchange.prompt, len(numbers)) for exchange in exchanges]


def _place(opening: str) -> float:
    digest = hashlib.sha256(f"calibration {opening}".encode("utf-8", "surrogatepass")).digest()
    return float(int.from_bytes(digest[:8], "big")) / 2.0**64


def _read_prompt(row: Row) -> str | tuple[Message, ...]:
    prompt = row.values.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_turn(turn) for turn in prompt):
        return tuple(Message(turn["role"], turn["content"]) for turn in prompt)
    raise DatasetError(f'{row.place}: "prompt" must be a string or a list of messages.')


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
