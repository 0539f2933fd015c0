"""The items that a load test sends: seeded texts, each with a number that no other item of the run has.

With the number in the text no two items have the same expected reward, so an answer that was lost, duplicated, or
swapped with another one is found where the rewards can be computed from the texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

from loadtest.workload import Workload

ITEMS_OF_A_DRAW = 512
GROUP_SIZE = 8

Item = dict[str, str]


class ItemSource(Protocol):
    """Yields items without end."""

    def take(self, num_items: int) -> list[Item]:
        """Return the next items."""
        ...


class WorkloadItems:
    """Items with the lengths and groups of a workload."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._items = self._drawn(workload, seed)

    def take(self, num_items: int) -> list[Item]:
        """Return the next items; those of a group follow each other."""
        return list(itertools.islice(self._items, num_items))

    def _drawn(self, workload: Workload, seed: int) -> Iterator[Item]:
        numbers = itertools.count()
        for draw in itertools.count():
            for group in workload.draw(ITEMS_OF_A_DRAW, seed * 1_000_003 + draw):
                for completion in group.completions:
                    yield {"prompt": group.prompt, "completion": f" {next(numbers)}{completion}"}


class EqualItems:
    """Items of one size in bytes, which are the oracle's tokens, in groups of 8 with a common prompt.

    Args:
        num_bytes: of each item; at least 32.
        seed: becomes a part of each text.
    """

    def __init__(self, num_bytes: int, seed: int) -> None:
        self._num_bytes = num_bytes
        self._seed = seed
        self._numbers = itertools.count()

    def take(self, num_items: int) -> list[Item]:
        """Return the next items."""
        return [self._item(next(self._numbers)) for _ in range(num_items)]

    def _item(self, number: int) -> Item:
        prompt_bytes = self._num_bytes // 3
        prompt = f"{self._seed}:{number // GROUP_SIZE}?".ljust(prompt_bytes)
        return {"prompt": prompt, "completion": f"{number} ".ljust(self._num_bytes - len(prompt), "x")}
