"""Selects completions by their rewards, for best-of-n and rejection sampling.

A block hands over at most as many candidates of each prompt as may be selected; a job holds those of all prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from scoring.blocks import BlockKey, InputRow, prompt_of
from service.errors import JobError

_TOP_K = re.compile(r"top-k:([1-9]\d*)")

Candidate: TypeAlias = tuple[str, int, float]
"""Hash of the prompt, index of the row in its block, reward."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which completions of each prompt are written."""

    count: int
    lowest: bool = False

    def order(self, reward: float) -> float:
        """Return a number that is smaller for a completion that is preferred."""
        return reward if self.lowest else -reward

    def __str__(self) -> str:
        return "worst" if self.lowest else "best" if self.count == 1 else f"top-k:{self.count}"


def selection(text: str) -> Selection:
    """Return the selection of a command line.

    Raises:
        ArgumentTypeError: it is none of best, worst and top-k:N.
    """
    if text in {"best", "worst"}:
        return Selection(1, lowest=text == "worst")
    if match := _TOP_K.fullmatch(text):
        return Selection(int(match[1]))
    raise argparse.ArgumentTypeError("use best, worst or top-k:N")


def candidates_of(rows: Sequence[InputRow], columns: Sequence[Mapping[str, Any]], wanted: Selection) -> list[Candidate]:
    """Return the rows of a block that may be selected.

    Raises:
        JobError: a row is a pair, whose completions are chosen already; or it has no reward to select by.
    """
    by_prompt: defaultdict[str, list[Candidate]] = defaultdict(list)
    for index, (row, added) in enumerate(zip(rows, columns, strict=True)):
        if row.parsed is not None and len(row.parsed.completions) > 1:
            raise JobError(f"{row.source}, row {row.number} is a pair: --select needs rows of one completion each.")
        if row.parsed is not None and added.get("reward") is None and "error_code" not in added:
            raise JobError("The model has several outputs and no weights of them: --select needs --weights.")
        if added.get("reward") is not None:
            key = hashlib.sha256(repr(prompt_of(row)).encode(errors="surrogatepass")).hexdigest()[:32]
            by_prompt[key].append((key, index, added["reward"]))
    return [candidate for found in by_prompt.values() for candidate in _first(found, wanted)]


def _first(found: Iterable[Candidate], wanted: Selection) -> list[Candidate]:
    return sorted(found, key=lambda candidate: (wanted.order(candidate[2]), candidate[1]))[: wanted.count]


def select(candidates: Mapping[BlockKey, Sequence[Candidate]], wanted: Selection) -> dict[BlockKey, dict[int, int]]:
    """Return for each block the indices of the selected rows, and the rank of each among its prompt's, from 1.

    Of equal rewards the earlier row comes first.
    """
    by_prompt: defaultdict[str, list[tuple[float, BlockKey, int]]] = defaultdict(list)
    for key, found in candidates.items():
        for prompt, index, reward in found:
            by_prompt[prompt].append((wanted.order(reward), key, index))
    selected: dict[BlockKey, dict[int, int]] = {key: {} for key in candidates}
    for entries in by_prompt.values():
        for rank, (_, key, index) in enumerate(sorted(entries)[: wanted.count], start=1):
            selected[key][index] = rank
    return selected
