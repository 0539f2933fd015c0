"""Preference pairs as people gave them: which of two completions of a prompt was chosen, and by whom.

Rows come in two forms: ``{"prompt", "chosen", "rejected"}`` with completions as texts or as one assistant message, or
``{"chosen", "rejected"}`` as two conversations that differ in their last message (TRL's preference formats with an
explicit and an implicit prompt). It knows no tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from service.data.rows import Row
from service.errors import DatasetError
from service.records import Message
from training.sources import Source, read_source, source_name

Verdict: TypeAlias = Literal["chosen", "rejected", "tie"]
"""What one reviewer said of a pair, in terms of the label that the pair carries."""


@dataclass(frozen=True, slots=True)
class Review:
    """The verdict of one reviewer; reviewers of one data set are told apart by name."""

    reviewer: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, of which people preferred the first.

    ``id``: the row's own name, else its place. ``source``: the data set it came from. ``reviews``: what each of several
    reviewers said, where that is known.
    """

    prompt: str | tuple[Message, ...] = field(repr=False)
    chosen: str = field(repr=False)
    rejected: str = field(repr=False)
    id: str = ""
    source: str = ""
    reviews: tuple[Review, ...] = ()

    @property
    def excess_chars(self) -> int:
        """Characters by which the chosen completion is longer; negative where it is shorter."""
        return len(self.chosen) - len(self.rejected)

    @property
    def support(self) -> float | None:
        """The share of the reviewers on the side of the chosen completion, ties counted one half; None without any."""
        if not self.reviews:
            return None
        weights = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
        return sum(weights[review.verdict] for review in self.reviews) / len(self.reviews)


def read_pairs(sources: Iterable[Source]) -> Iterator[PreferencePair]:
    """Yield the pairs of data files, of folders of them and of data sets on the hub, in order.

    Raises:
        DatasetError: a source cannot be read, or a row is no pair; names the place, never the text.
    """
    for source in sources:
        for row in read_source(source):
            yield parse_pair(row, default_source=source_name(source))


def parse_pair(row: Row, default_source: str = "") -> PreferencePair:
    """Make a pair of a row.

    Args:
        row: of either form; further keys are ``id``, ``source`` and ``reviews`` (a list of verdicts, or an object of
            verdicts by reviewer), all others are ignored.
        default_source: the source of a row that names none.

    Raises:
        DatasetError: the row is no pair; names the place, never the text.
    """
    prompt, chosen, rejected = _parse_contents(row)
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        id=str(row.values.get("id") or row.place),
        source=str(row.values.get("source") or default_source),
        reviews=_parse_reviews(row),
    )


def _parse_contents(row: Row) -> tuple[str | tuple[Message, ...], str, str]:
    values = row.values
    if "prompt" in values:
        return _parse_prompt(row), _parse_completion("chosen", row), _parse_completion("rejected", row)
    if isinstance(values.get("chosen"), list) and isinstance(values.get("rejected"), list):
        return _split_conversations(_parse_turns("chosen", row), _parse_turns("rejected", row), row)
    raise DatasetError(
        f'{row.place}: there is no "prompt"; without one, "chosen" and "rejected" must be conversations that begin '
        "with it."
    )


def _parse_prompt(row: Row) -> str | tuple[Message, ...]:
    prompt = row.values["prompt"]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(isinstance(turn, dict) for turn in prompt):
        raise DatasetError(f'{row.place}: "prompt" must be a string or a list of messages.')
    return tuple(_parse_turns("prompt", row))


def _parse_completion(key: str, row: Row) -> str:
    if isinstance(row.values.get(key), list):
        turns = _parse_turns(key, row)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise DatasetError(f'{row.place}: "{key}" must be a text or one assistant message.')
        return turns[0].content
    return _parse_text(row.values, key, row)


def _split_conversations(
    chosen: list[Message], rejected: list[Message], row: Row
) -> tuple[tuple[Message, ...], str, str]:
    """The prompt is what the two have in common; each must go on with one assistant message."""
    before_last = zip(chosen[:-1], rejected[:-1], strict=False)
    common = [turn for turn, _ in itertools.takewhile(lambda turns: turns[0] == turns[1], before_last)]
    for conversation in (chosen, rejected):
        if not common or len(conversation) != len(common) + 1 or conversation[-1].role != "assistant":
            raise DatasetError(
                f'{row.place}: "chosen" and "rejected" must have all turns in common but their last, an assistant\'s.'
            )
    return tuple(common), chosen[-1].content, rejected[-1].content


def _parse_turns(key: str, row: Row) -> list[Message]:
    turns = row.values[key]
    if not all(isinstance(turn, dict) for turn in turns):
        raise DatasetError(f'{row.place}: "{key}" must be a string or a list of messages.')
    return [Message(_parse_text(turn, "role", row), _parse_text(turn, "content", row)) for turn in turns]


def _parse_text(values: Mapping[str, Any], key: str, row: Row) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise DatasetError(f'{row.place}: "{key}" must be a string.')
    return text


def _parse_reviews(row: Row) -> tuple[Review, ...]:
    given = row.values.get("reviews")
    if given is None:
        return ()
    if isinstance(given, list):
        given = {str(number): verdict for number, verdict in enumerate(given, start=1)}
    if not isinstance(given, dict) or not all(said is None or said in get_args(Verdict) for said in given.values()):
        raise DatasetError(
            f'{row.place}: "reviews" must be verdicts ("chosen", "rejected" or "tie"), in a list or by reviewer.'
        )
    # Parquet has the same columns for all rows: a reviewer who did not see this pair stands there with a null.
    return tuple(Review(name, said) for name, said in given.items() if said is not None)
