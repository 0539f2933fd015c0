"""Reads whole data files as prompts with completions, and reports what it found in each of them.

The rule for rows that are not as expected: a row that is no row of any accepted form, or that is written in another
form than the rows before it, is an error, because the file is then not understood. A row of the file's form that has no
completion to score (see `service.errors.UnusableRow`) is left out and counted. Everything else is read as it is:
repeated rows and ties are counted, not removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from service.data.decoders import FileFacts
from service.data.files import DataFile
from service.data.prompts import Form, PromptCompletions, check_values, parse_completions, parse_pair
from service.data.rows import Row, dataset_files, read_rows_of
from service.errors import DatasetError, UnusableRow

Tell: TypeAlias = Callable[[str], None]
"""Called with one line of text for the user."""

Example: TypeAlias = tuple[Row, PromptCompletions]
"""A row and what it means."""


@dataclass(slots=True)
class LeftOut:
    """Rows that are left out for one reason."""

    first: int
    """Number of the first such row."""

    count: int = 0


@dataclass(slots=True)
class Reading:
    """What was found in one file; filled while it is read."""

    path: DataFile
    facts: FileFacts = field(default_factory=FileFacts)
    form: Form | None = None
    num_rows: int = 0

    num_repeated: int = 0
    """Rows with the prompt and the completions of an earlier row."""

    num_ties: int = 0
    """Pairs of identical completions."""

    num_echoes: int = 0
    """Rows of plain texts whose completions all begin with the prompt."""

    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """By reason."""

    @property
    def name(self) -> str:
        """The file's name without its folder; the whole id of a data set on the hub."""
        return self.path.name if self.path.exists() else str(self.path)

    @property
    def num_left_out(self) -> int:
        """Rows that are left out, for any reason."""
        return sum(found.count for found in self.left_out.values())

    @property
    def reasons(self) -> str:
        """Why rows are left out, with counts: ``3 because ... (first: row 17)``."""
        return ", ".join(
            f"{found.count:,} because {reason} (first: row {found.first})" for reason, found in self.left_out.items()
        )

    def leave_out(self, row: Row, reason: str) -> None:
        """Count a row that is left out."""
        self.left_out.setdefault(reason, LeftOut(row.number)).count += 1

    def lines(self) -> list[str]:
        """Return the form that was found, and in a second line what else is worth knowing, if anything."""
        rows = f"{self.name}: {_count(self.num_rows, 'row')}"
        notes = self._notes()
        lines = [f"{rows}, {self.form}" if self.form else rows]
        return [*lines, f"{self.name}: {'; '.join(notes)}"] if notes else lines

    def _notes(self) -> list[str]:
        facts, notes = self.facts, []
        if facts.has_byte_order_mark:
            notes.append("a byte-order mark at the start")
        if facts.has_crlf:
            notes.append("CRLF line ends")
        if facts.num_blank_lines:
            notes.append(_count(facts.num_blank_lines, "blank line"))
        if self.num_repeated:
            notes.append(f"{_count(self.num_repeated, 'row')} with the same texts as an earlier row (not left out)")
        if self.num_ties:
            notes.append(f"{_count(self.num_ties, 'pair')} of identical completions (not left out)")
        if self.num_echoes:
            notes.append(
                f"{_count(self.num_echoes, 'row')} whose completions begin with the prompt (read as they are; without "
                'the key "prompt" the common words are removed)'
            )
        if self.left_out:
            notes.append(f"{_count(self.num_left_out, 'row')} left out: {self.reasons}")
        return notes


def read_examples(path: Path, *, pairs_only: bool = False, tell: Tell | None = None) -> Iterator[Example]:
    """Yield the rows of a data file, or of all data files of a folder or a glob pattern, with what they mean.

    Args:
        path: see `service.data.rows.dataset_files`.
        pairs_only: whether rows must be pairs of a chosen and a rejected completion.
        tell: called at the end of each file with the lines of its `Reading`.

    Raises:
        DatasetError: a file cannot be read, has rows of several forms, or has a row of no accepted form; there is no
            row at all, or none that can be used. Names file and row, never the text. It is raised when that row is
            reached, after the rows before it were yielded.
    """
    num_rows = 0
    for file in dataset_files(path):
        reading = Reading(file)
        yield from parse_rows(read_rows_of(file, reading.facts), reading, pairs_only=pairs_only, tell=tell)
        num_rows += reading.num_rows
    if not num_rows:
        raise DatasetError(f"{path} has no rows.")


def parse_rows(
    rows: Iterable[Row], reading: Reading, *, pairs_only: bool = False, tell: Tell | None = None
) -> Iterator[Example]:
    """Yield the rows of one file with what they mean; see `read_examples`."""
    seen: set[int] = set()
    for row in rows:
        reading.num_rows += 1
        try:
            parsed = parse_row(row, reading, pairs_only=pairs_only)
        except UnusableRow as error:
            reading.leave_out(row, error.reason)
            continue
        _count_properties(parsed, reading, seen)
        yield row, parsed
    if reading.num_rows and reading.num_left_out == reading.num_rows:
        raise DatasetError(f"{reading.path} has no row that can be used; left out: {reading.reasons}.")
    if tell is not None:
        for line in reading.lines():
            tell(line)


def parse_row(row: Row, reading: Reading, *, pairs_only: bool = False) -> PromptCompletions:
    """Return what one row of a file means; the first one gives ``reading.form``, which the others must have.

    Raises:
        UnusableRow: the row has no completion that can be scored.
        DatasetError: the row has no accepted form, or another one than the rows before it.
    """
    form = reading.form
    if form is not None:
        for key in (*form.keys, *(("prompt",) if form.prompt else ())):
            check_values(row, [key])
    parsed = parse_pair(row) if pairs_only else parse_completions(row)
    _check_form(row, parsed, reading)
    return parsed


def _check_form(row: Row, parsed: PromptCompletions, reading: Reading) -> None:
    if reading.form is None:
        reading.form = parsed.form
    elif parsed.form != reading.form:
        raise DatasetError(
            f"{row.location} has {parsed.form}, but the rows before it have {reading.form}: the rows of a file must "
            "all have one form."
        )


def _count_properties(parsed: PromptCompletions, reading: Reading, seen: set[int]) -> None:
    completions, prompt = parsed.completions, parsed.prompt
    key = hash((prompt, completions, parsed.tools))
    reading.num_repeated += key in seen
    seen.add(key)
    reading.num_ties += len(completions) == 2 and completions[0] == completions[1]
    reading.num_echoes += (
        isinstance(prompt, str)
        and bool(prompt)
        and all(isinstance(text, str) and text.startswith(prompt) for text in completions)
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
