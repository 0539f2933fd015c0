"""The record of one item on its way through the service, from its text to its outcome.

The scorer fills it in on the event loop; diagnostics and monitors only read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from service.diagnostics.text import TextFacts
from service.errors import HttpError, InternalError
from service.records import Item, Score, TokenSequence

Outcome: TypeAlias = Score | HttpError
"""What becomes of an item: its Score, or the error that is reported in its place."""


@dataclass(slots=True)
class ItemState:
    """One item of a request and what is known of it so far."""

    item: Item

    encoded: TokenSequence | HttpError
    """What tokenization returned for it."""

    text: TextFacts | None = None
    """Statistics of its completion; None where they were not requested, or the completion is unknown."""

    outcome: Outcome | None = None
    """The Score, or an error of tokenization or of the engine; None while the item waits."""

    @property
    def sequence(self) -> TokenSequence | None:
        """The tokens of the item; None where it was refused."""
        return self.encoded if isinstance(self.encoded, TokenSequence) else None


def outcomes_of(items: Sequence[ItemState]) -> tuple[Outcome, ...]:
    """Return the outcome of each item, in order.

    Raises:
        InternalError: some item has none yet.
    """
    outcomes = tuple(item.outcome for item in items if item.outcome is not None)
    if len(outcomes) != len(items):
        raise InternalError(f"{len(items) - len(outcomes)} items have no outcome.")
    return outcomes
