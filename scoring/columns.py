"""The columns of the output: the row as it was read, where it stands, its rewards, its diagnostics and its error.

Diagnostics are the members of a result of ``POST /v1/score``, flattened: the name of a block precedes the names of its
members (``length_scored_tokens``, ``ood_p_value``), unless a member's name begins with it (``length_z``).
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from reward_client.options import DiagnosticsLevel

from scoring.blocks import InputRow, RowError
from service.diagnostics.resampled_heads import lower_reward
from service.protocols.native_answers import BASIC_DIAGNOSTICS, FULL_DIAGNOSTICS
from service.records import Score

Answer: TypeAlias = Mapping[str, Any] | RowError
"""A reward with its diagnostics, as the members of a result; or why there is none."""

PAIR_PREFIXES = ("chosen_", "rejected_")
LOCATION_COLUMNS: Mapping[str, type] = {"source_file": str, "source_row": int}
LAST_COLUMNS: Mapping[str, type] = {"model_version": str, "error_code": str, "error_detail": str}
RANK_COLUMN = "rank"
LOWER_COLUMN = "reward_lower"

_PYTHON_TYPES = (bool, int, float, str)
_RENAMED = "input_"


@lru_cache
def diagnostic_columns(level: DiagnosticsLevel) -> dict[str, tuple[tuple[str, ...], type]]:
    """Return for each column of diagnostics the path of the member in a result, and its type."""
    if level == "none":
        return {}
    names = [*BASIC_DIAGNOSTICS, *(FULL_DIAGNOSTICS if level == "full" else ()), "group"]
    hints = get_type_hints(Score)
    flat = [entry for name in names for entry in _flatten((name,), hints[name])]
    return {column: (path, kind) for column, path, kind in flat} | {"calibration": (("calibration",), str)}


def _flatten(path: tuple[str, ...], hint: Any) -> Iterator[tuple[str, tuple[str, ...], type]]:
    hint = _without_none(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        for member in fields(hint):
            yield from _flatten((*path, member.name), hints[member.name])
        return
    kind = type(get_args(hint)[0]) if get_origin(hint) is typing.Literal else hint
    if kind in _PYTHON_TYPES:
        yield _column_name(path), path, kind


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in {Union, UnionType}:
        return next(member for member in get_args(hint) if member is not type(None))
    return hint


def _column_name(path: Sequence[str]) -> str:
    name = path[-1]
    for block in reversed(path[:-1]):
        if not name.startswith(f"{block}_"):
            name = f"{block}_{name}"
    return name


OUTPUT_PREFIX = "output_"
"""Put in front of the name of each output of a model with several."""


@lru_cache
def own_columns(
    level: DiagnosticsLevel, *, pairs: bool, items: bool, outputs: tuple[str, ...] = (), lower: bool = False
) -> dict[str, type]:
    """Return the columns that are added to those of the input, with their types, in order.

    Args:
        level: of diagnostics.
        outputs: names of the outputs of a model with several.
        pairs: whether there are rows with a chosen and a rejected completion.
        items: whether there are rows of one completion.
        lower: whether a lower reward is asked for.
    """
    rewards = {"reward": float} | {OUTPUT_PREFIX + name: float for name in outputs}
    rewards |= {LOWER_COLUMN: float} if lower else {}
    diagnostics = rewards | {name: kind for name, (_, kind) in diagnostic_columns(level).items()}
    columns = dict(LOCATION_COLUMNS)
    if items:
        columns |= diagnostics
    if pairs:
        columns |= {prefix + name: kind for prefix in PAIR_PREFIXES for name, kind in diagnostics.items()}
        columns["margin"] = float
    return columns | dict(LAST_COLUMNS)


@lru_cache
def _reserved(level: DiagnosticsLevel, outputs: tuple[str, ...]) -> frozenset[str]:
    columns = own_columns(level, pairs=True, items=True, outputs=outputs, lower=level == "full")
    return frozenset(columns) | {RANK_COLUMN}


def input_columns(values: Mapping[str, Any], level: DiagnosticsLevel, outputs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the columns of the input; one that has the name of an added column is called ``input_NAME``."""
    reserved = _reserved(level, outputs)
    return {name if _original(name) not in reserved else _RENAMED + name: value for name, value in values.items()}


def _original(name: str) -> str:
    while name.startswith(_RENAMED):
        name = name.removeprefix(_RENAMED)
    return name


def scored_columns(
    row: InputRow,
    answers: Sequence[Answer],
    version: str,
    level: DiagnosticsLevel,
    pessimism: float | None = None,
) -> dict[str, Any]:
    """Return the columns that are added to a row.

    Args:
        row: as it was read.
        answers: one for each of its completions; none where it could not be parsed.
        version: of the model.
        level: of diagnostics.
        pessimism: standard deviations that the lower reward is below the reward; None: there is no such column.

    Returns:
        Columns of `own_columns`; those that are absent are null. Of a pair in which one completion has an error, the
        other one has its reward, and there is no margin. A model with several outputs and no weights has no reward.
    """
    columns: dict[str, Any] = {"source_file": row.source, "source_row": row.number, "model_version": version}
    error = row.error
    is_pair = len(answers) > 1
    for prefix, answer in zip(PAIR_PREFIXES if is_pair else ("",), answers, strict=False):
        if isinstance(answer, RowError):
            error = error or (RowError(answer.code, f"{prefix[:-1]}: {answer.detail}") if is_pair else answer)
        else:
            columns |= _answer_columns(prefix, answer, level)
            if pessimism is not None:
                columns[prefix + LOWER_COLUMN] = lower_reward(
                    answer["reward"], answer.get("reward_disagreement"), pessimism
                )
    if is_pair and error is None and columns["chosen_reward"] is not None:
        columns["margin"] = columns["chosen_reward"] - columns["rejected_reward"]
    return columns | ({} if error is None else {"error_code": error.code, "error_detail": error.detail})


def _answer_columns(prefix: str, answer: Mapping[str, Any], level: DiagnosticsLevel) -> dict[str, Any]:
    columns: dict[str, Any] = {prefix + "reward": answer["reward"]}
    columns |= {f"{prefix}{OUTPUT_PREFIX}{name}": value for name, value in answer.get("rewards", {}).items()}
    for name, (path, _) in diagnostic_columns(level).items():
        columns[prefix + name] = _member(answer, path)
    return columns


def _member(answer: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = answer
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
