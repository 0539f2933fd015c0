"""Progress display of commands: a progress bar over items, or the running stage.

On a terminal both are animated; where the output is a file, stages are plain lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance: TypeAlias = Callable[[int], None]
"""Called with the number of further items that are complete."""

Stage: TypeAlias = Callable[[str], None]
"""Called with the name of each stage as it begins."""


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Advance]:
    """Show how many of ``total`` items are complete and how long the rest will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield partial(progress.advance, task)


@contextmanager
def stages(console: Console) -> Iterator[Stage]:
    """Show each stage with the time that it takes: the completed ones above, the running one with a spinner."""
    if not console.is_terminal:
        yield partial(console.print, markup=False, highlight=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        running: list[TaskID] = []

        def begin(name: str) -> None:
            for task in running:
                progress.update(task, total=1, completed=1)
            running.append(progress.add_task(name, total=None))

        yield begin
