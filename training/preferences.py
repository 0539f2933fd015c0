"""Preference pairs: which of two completions of a prompt was chosen, and by which annotators.

`service.data.prompts` defines the rows; this module adds the pair's id, its source and its reviews. Nothing here is
tokenized.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from service.data.prompts import Prompt, PromptCompletions
from service.data.prompts import parse_pair as parse_texts
from service.data.reading import Tell
from service.data.rows import Row
from service.errors import DatasetError
from service.records import Completion, completion_text
from training.sources import Source, read_pair_rows, source_name

Vote: TypeAlias = Literal["chosen", "rejected", "tie"]
"""The completion that one annotator preferred, named by the pair's label."""


@dataclass(frozen=True, slots=True)
class Review:
    """The vote of one annotator on a pair."""

    annotator: str
    """Unique within a data set."""

    vote: Vote


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, of which the first was preferred."""

    prompt: Prompt = field(repr=False)
    chosen: Completion = field(repr=False)
    rejected: Completion = field(repr=False)

    tools: str = field(default="", repr=False)
    """Descriptions of the tools that the assistant may call, as a JSON array; empty without tools."""

    id: str = ""
    """The row's ``id``, else its file and number."""

    source: str = ""
    """The data set that the pair belongs to."""

    reviews: tuple[Review, ...] = ()
    """The votes of single annotators, where they are known."""

    objective: str = ""
    """What the completions were compared by, such as ``helpfulness``; empty where the row does not say."""

    location: str = field(default="", compare=False)
    """The row's file and number, for messages."""

    @property
    def texts(self) -> tuple[str, str]:
        """The chosen and the rejected completion as one text each, see `service.records.completion_text`."""
        return completion_text(self.chosen), completion_text(self.rejected)

    @property
    def serialized(self) -> tuple[str, str]:
        """The chosen and the rejected completion as one string each, messages as JSON with all that they hold."""
        return _serialized(self.chosen), _serialized(self.rejected)

    @property
    def has_texts(self) -> bool:
        """Whether both completions are one assistant turn that is only text."""
        return isinstance(self.chosen, str) and isinstance(self.rejected, str)

    @property
    def excess_chars(self) -> int:
        """Characters by which the chosen completion is longer; negative where it is shorter."""
        chosen, rejected = self.texts
        return len(chosen) - len(rejected)

    @property
    def support(self) -> float | None:
        """The share of annotators who preferred the chosen completion, ties counted as a half; None without reviews."""
        if not self.reviews:
            return None
        weights = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
        return sum(weights[review.vote] for review in self.reviews) / len(self.reviews)


def _serialized(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return json.dumps([turn.as_dict() for turn in completion], ensure_ascii=False)


def read_pairs(sources: Iterable[Source], tell: Tell | None = None) -> Iterator[PreferencePair]:
    """Yield the pairs of data files, of folders and patterns of them and of data sets on the hub, in order.

    Args:
        sources: to read.
        tell: called with what was found in each file, see `service.data.reading.Reading`.

    Raises:
        DatasetError: a source cannot be read, or a row is not a pair; names file and row, never the text.
    """
    for source in sources:
        for row, texts in read_pair_rows(source, tell):
            yield _pair(row, texts, source_name(source))


def parse_pair(row: Row, default_source: str = "") -> PreferencePair:
    """Return the pair of a row.

    Args:
        row: a pair as `service.data.prompts` defines it; further keys are ``id``, ``source``, ``objective`` and
            ``reviews`` (a list of votes, or an object of votes by annotator), all others are ignored.
        default_source: the source of a row that has none.

    Raises:
        DatasetError: the row is not a pair; names file and row, never the text.
    """
    return _pair(row, parse_texts(row), default_source)


def _pair(row: Row, texts: PromptCompletions, default_source: str) -> PreferencePair:
    chosen, rejected = texts.completions
    return PreferencePair(
        prompt=texts.prompt,
        chosen=chosen,
        rejected=rejected,
        tools=texts.tools,
        id=str(row.values.get("id") or row.location),
        source=str(row.values.get("source") or default_source),
        reviews=_parse_reviews(row),
        objective=_parse_objective(row),
        location=row.location,
    )


def _parse_objective(row: Row) -> str:
    given = row.values.get("objective")
    if given is None:
        return ""
    if not isinstance(given, str):
        raise DatasetError(f'{row.location}: "objective" must be the name of an objective, a string.')
    return given


def _parse_reviews(row: Row) -> tuple[Review, ...]:
    given = row.values.get("reviews")
    if given is None:
        return ()
    if isinstance(given, str):  # a field of a CSV file
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    if isinstance(given, list):
        given = {str(number): vote for number, vote in enumerate(given, start=1)}
    if not isinstance(given, dict) or not all(vote is None or vote in get_args(Vote) for vote in given.values()):
        raise DatasetError(
            f'{row.location}: "reviews" must be votes ("chosen", "rejected" or "tie"), in a list or by annotator.'
        )
    # Parquet has the same columns for all rows, so the vote of an annotator who did not see this pair is null.
    return tuple(Review(name, vote) for name, vote in given.items() if vote is not None)
