"""Diagnostics as columns of numbers, the form in which trainers log them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from reward_client.answers import ScoredItem
from reward_client.diagnostics import Diagnostics, LengthBlock, OodBlock
from reward_client.errors import InvalidArgument
from reward_client.options import DiagnosticsLevel

KEY_PREFIX = "rm_"
"""Put in front of a column's name wherever columns of other sources are logged too."""


@dataclass(frozen=True, slots=True)
class Column:
    """One number per item."""

    level: DiagnosticsLevel
    """The level of diagnostics that contains it."""

    read: Callable[[Diagnostics], float | None]
    """Its value; None where it is unknown."""


_NO_LENGTH, _NO_OOD = LengthBlock(), OodBlock()

COLUMNS: Mapping[str, Column] = {
    "scored_tokens": Column("basic", lambda item: (item.length or _NO_LENGTH).scored_tokens),
    "completion_tokens": Column("basic", lambda item: (item.length or _NO_LENGTH).completion_tokens),
    "truncated": Column("basic", lambda item: (item.length or _NO_LENGTH).truncated),
    "length_percentile": Column("basic", lambda item: (item.length or _NO_LENGTH).length_percentile),
    "reward_percentile": Column("basic", lambda item: item.reward_percentile),
    "reward_length_adjusted": Column("basic", lambda item: item.reward_length_adjusted),
    "ood_p": Column("full", lambda item: (item.ood or _NO_OOD).p_value),
    "ood_flag": Column("full", lambda item: (item.ood or _NO_OOD).flag),
}
"""The columns by name. Flags are 0 and 1."""


def check_columns(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of columns as a tuple.

    Raises:
        InvalidArgument: there is no column of that name, or the names are one string.
    """
    if isinstance(names, str):
        raise InvalidArgument("The names of the diagnostics must be a list of strings, not one string")
    found = tuple(names)
    if not all(name in COLUMNS for name in found):
        raise InvalidArgument(f"Diagnostics that can be logged are {', '.join(COLUMNS)}")
    return found


def level_of(names: Iterable[str]) -> DiagnosticsLevel:
    """Return the lowest level of diagnostics that contains the columns."""
    levels = {COLUMNS[name].level for name in names}
    if "full" in levels:
        return "full"
    return "basic" if levels else "none"


def columns_in(level: DiagnosticsLevel) -> tuple[str, ...]:
    """Return the names of the columns that a level of diagnostics contains."""
    contained = {"none": (), "basic": ("basic",), "full": ("basic", "full")}[level]
    return tuple(name for name, column in COLUMNS.items() if column.level in contained)


def column_values(items: Sequence[ScoredItem], names: Iterable[str]) -> dict[str, list[float | None]]:
    """Return each column with one number per item, None where it is unknown."""
    details = [item.details for item in items]
    return {name: [_number(COLUMNS[name].read(item)) for item in details] for name in names}


def named_reward(item: ScoredItem, name: str) -> float:
    """Return one output of a model with several.

    Raises:
        InvalidArgument: the model has no output of that name.
    """
    if name not in item.rewards:
        names = ", ".join(item.rewards) or "one, which has no name"
        raise InvalidArgument(f"The model has no output {name}; its outputs are {names}")
    return item.rewards[name]


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None if there are none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def numbers(item: ScoredItem, names: Iterable[str]) -> dict[str, float]:
    """Return the columns of one item as floats under prefixed keys, NaN where a value is unknown.

    For frameworks that need the same numeric keys for every item.
    """
    return {
        KEY_PREFIX + name: math.nan if value is None else value
        for name, [value] in column_values([item], names).items()
    }


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
