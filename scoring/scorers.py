"""What a job needs of something that scores: blocks in, blocks with answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scoring.blocks import Block, RowError
from scoring.columns import Answer
from service.records import Item


@dataclass(frozen=True, slots=True)
class ScoredBlock:
    """A block whose rewards are known."""

    block: Block

    answers: Callable[[], Sequence[Answer]] = field(repr=False)
    """Returns one answer for each item of the block; may be called in another thread, once."""


class BlockScorer(Protocol):
    """Scores blocks with one model."""

    @property
    def version(self) -> str:
        """Version of the model."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a model with several; empty for a model with one."""
        ...

    def score_blocks(self, blocks: Iterable[Block]) -> Iterator[ScoredBlock]:
        """Yield every block once with its answers, in any order; blocks are read only as others are completed."""
        ...


def refuse_long(item: Item, max_chars: int) -> RowError | None:
    """Return the error of an item of more characters than the service takes, else None."""
    num_chars = item.content.num_chars
    if num_chars <= max_chars:
        return None
    return RowError("item_too_long", f"The item has {num_chars} characters; the limit is {max_chars}")
