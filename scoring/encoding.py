"""Turns a scored block into what a job stores: the bytes of its part file, and its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reward_client.options import DiagnosticsLevel

from scoring.blocks import BlockKey
from scoring.columns import Answer, input_columns, own_columns, scored_columns
from scoring.parts import Format, encode_part
from scoring.scorers import ScoredBlock
from scoring.selection import Candidate, Selection, candidates_of
from scoring.statistics import Statistics, statistics_of


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """What is written of each row."""

    kind: Format
    level: DiagnosticsLevel
    selection: Selection | None = None

    pessimism: float | None = None
    """Standard deviations that the column ``reward_lower`` is below the reward; None: there is no such column."""


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """A finished block, without its rows."""

    key: BlockKey
    digest: str
    num_bytes: int
    statistics: Statistics

    candidates: tuple[Candidate, ...] = ()
    """Rows that may be selected; empty without a selection."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them."""
        return {
            "key": list(self.key),
            "digest": self.digest,
            "bytes": self.num_bytes,
            "statistics": self.statistics.as_json(),
            "candidates": [list(candidate) for candidate in self.candidates],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BlockRecord:
        """Return the record that `as_json` wrote."""
        unit, index = values["key"]
        statistics = Statistics.from_json(values["statistics"])
        candidates = tuple((prompt, row, reward) for prompt, row, reward in values["candidates"])
        return cls((unit, index), values["digest"], values["bytes"], statistics, candidates)


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A finished block with its part file."""

    record: BlockRecord
    content: bytes = field(repr=False)


def encode_block(scored: ScoredBlock, version: str, plan: OutputPlan, outputs: tuple[str, ...] = ()) -> EncodedBlock:
    """Return the part file and the record of a scored block.

    Args:
        scored: the block.
        version: of the model.
        plan: of the output.
        outputs: names of the outputs of a model with several.

    Raises:
        JobError: a row is a pair or has no reward, and completions are to be selected.
    """
    block, level = scored.block, plan.level
    answers = iter(scored.answers())
    added: list[dict[str, Any]] = []
    for row in block.rows:
        count = 0 if row.parsed is None else len(row.parsed.completions)
        own: list[Answer] = [next(answers) for _ in range(count)]
        added.append(scored_columns(row, own, version, level, plan.pessimism))
    num_pairs = sum(row.parsed is not None and len(row.parsed.completions) > 1 for row in block.rows)
    num_items = sum(row.parsed is not None and len(row.parsed.completions) == 1 for row in block.rows)
    own_types = own_columns(
        level,
        pairs=num_pairs > 0,
        items=num_items > 0 or not num_pairs,
        outputs=outputs,
        lower=plan.pessimism is not None,
    )
    inputs = [input_columns(row.values, level, outputs) for row in block.rows]
    content = encode_part(inputs, added, own_types, plan.kind, [row.parsed is not None for row in block.rows])
    candidates = () if plan.selection is None else tuple(candidates_of(block.rows, added, plan.selection))
    record = BlockRecord(block.key, block.digest, len(content), statistics_of(block.rows, added), candidates)
    return EncodedBlock(record, content)
