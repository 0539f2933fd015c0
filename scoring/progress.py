"""The progress of a job on a terminal: rows, items a second and the time that is left; nothing where it is a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Done: TypeAlias = Callable[[int, int], None]
"""Called with the numbers of further rows and items that are finished; items that were finished before do not count."""


@contextmanager
def shown_progress(console: Console, num_rows: int | None, num_finished: int) -> Iterator[Done]:
    """Show how far a job is.

    Args:
        console: standard error.
        num_rows: rows of all files; None: not known, so that no end is foreseen.
        num_finished: rows that an earlier run of the job has finished.
    """
    if not console.is_terminal:
        yield lambda _rows, _items: None
        return
    columns = (
        TextColumn("Scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, {task.fields[rate]} items/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=num_rows, completed=num_finished, rate="-")
        begin, num_items = time.monotonic(), 0

        def done(rows: int, items: int) -> None:
            nonlocal num_items
            num_items += items
            seconds = max(time.monotonic() - begin, 1e-9)
            progress.update(task, advance=rows, rate=f"{num_items / seconds:,.1f}")

        yield done
