"""Reads a unit of files as blocks of rows: what is scored, written and resumed as a whole.

A row that cannot be read is an error in its position, with file and row, and the rows after it are read. Blocks depend
on the rows alone, so a job that is resumed forms the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from service.data.decoders import FileFacts, NumberedEntry, read_entries
from service.data.files import DataFile
from service.data.prompts import Prompt, PromptCompletions
from service.data.reading import Reading, parse_row
from service.data.rows import Row
from service.errors import DatasetError, UnusableRow
from service.records import Item

MAX_BLOCK_CHARS = 16 * 1024 * 1024
MAX_NAME_CHARS = 256
"""Characters of a group's name, as in the service's requests."""

BlockKey: TypeAlias = tuple[int, int]
"""Number of the unit, and of the block in it."""


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row, or one of its completions, has no reward."""

    code: str
    """``malformed_row``, ``unusable_row``, ``unreadable_file``, or the code of an item error of the service."""

    detail: str


@dataclass(frozen=True, slots=True)
class InputRow:
    """A row as it was read."""

    source: str
    number: int

    values: dict[str, Any] = field(repr=False)
    """Empty where the row is malformed."""

    parsed: PromptCompletions | None = field(repr=False)
    """None: ``error`` has the reason."""

    error: RowError | None = None

    def items(self) -> list[Item]:
        """Return one item for each completion."""
        if self.parsed is None:
            return []
        group = group_name(self.values)
        return [Item(exchange, group=group) for exchange in self.parsed.exchanges()]

    @property
    def num_chars(self) -> int:
        """Characters of the prompt and the completions."""
        return sum(item.content.num_chars for item in self.items())


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a unit."""

    key: BlockKey
    rows: tuple[InputRow, ...] = field(repr=False)

    digest: str
    """Hash of the rows, to notice an input that was changed between a job and its resumption."""

    def items(self) -> list[Item]:
        """Return the items of all rows, in order."""
        return [item for row in self.rows for item in row.items()]


def group_name(values: dict[str, Any]) -> str | int | None:
    """Return the name of the group that a row gives in its column ``group``, or None."""
    group = values.get("group")
    if isinstance(group, bool) or not isinstance(group, str | int):
        return None
    is_valid = len(group) <= MAX_NAME_CHARS if isinstance(group, str) else -(2**63) <= group < 2**63
    return group if is_valid else None


def read_blocks(unit: int, files: Sequence[DataFile], block_rows: int) -> Iterator[Block]:
    """Yield the blocks of a unit.

    A block ends after ``block_rows`` rows, but not between consecutive rows of one prompt, whose completions are
    compared with each other; at the latest it ends after twice as many, or after `MAX_BLOCK_CHARS`.
    """
    rows: list[InputRow] = []
    num_chars, index = 0, 0
    for row in read_input_rows(files):
        is_full = len(rows) >= block_rows or num_chars >= MAX_BLOCK_CHARS
        may_end = len(rows) >= 2 * block_rows or num_chars >= MAX_BLOCK_CHARS or not _same_prompt(rows[-1:], row)
        if is_full and may_end:
            yield _block((unit, index), rows)
            rows, num_chars, index = [], 0, index + 1
        rows.append(row)
        num_chars += row.num_chars
    if rows:
        yield _block((unit, index), rows)


def _same_prompt(last: Sequence[InputRow], row: InputRow) -> bool:
    return bool(last) and prompt_of(last[0]) is not None and prompt_of(last[0]) == prompt_of(row)


def prompt_of(row: InputRow) -> tuple[str, Prompt | str | int] | None:
    """Return what the rows that answer one prompt have in common; None for a row that could not be parsed."""
    if row.parsed is None:
        return None
    group = group_name(row.values)
    return ("prompt", row.parsed.prompt) if group is None else ("group", group)


def _block(key: BlockKey, rows: Iterable[InputRow]) -> Block:
    digest = hashlib.sha256()
    rows = tuple(rows)
    for row in rows:
        digest.update(repr((row.source, row.number, row.values)).encode(errors="surrogatepass"))
    return Block(key, rows, digest.hexdigest())


def read_input_rows(files: Iterable[DataFile]) -> Iterator[InputRow]:
    """Yield the rows of files; what cannot be read is a row with an error."""
    for file in files:
        reading = Reading(file)
        for number, entry in _entries(file, reading.facts):
            yield _parse(file, number, entry, reading)


class _UnreadableFile(DatasetError):
    """The rest of a file cannot be read."""


def _entries(file: DataFile, facts: FileFacts) -> Iterator[NumberedEntry]:
    last = 0
    try:
        for last, entry in read_entries(file, facts):
            yield last, entry
    except DatasetError as error:
        yield last + 1, _UnreadableFile(f"{error} No row after row {last} was read.")


def _parse(file: DataFile, number: int, entry: dict[str, Any] | DatasetError, reading: Reading) -> InputRow:
    if isinstance(entry, DatasetError):
        code = "unreadable_file" if isinstance(entry, _UnreadableFile) else "malformed_row"
        return InputRow(str(file), number, {}, None, RowError(code, str(entry)))
    try:
        return InputRow(str(file), number, entry, parse_row(Row(entry, file, number), reading))
    except DatasetError as error:
        code = "unusable_row" if isinstance(error, UnusableRow) else "malformed_row"
        return InputRow(str(file), number, entry, None, RowError(code, str(error)))
