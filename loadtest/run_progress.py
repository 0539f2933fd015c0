"""How far a measurement is and how long it still takes: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Self, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0

Planned: TypeAlias = tuple[str, int]
"""A kind of step and its size."""

Tell: TypeAlias = Callable[[str, int, int, float | None], None]
"""Called with the title of a step, the number of completed steps, of all steps, and the seconds that are left."""


@dataclass(slots=True)
class RunTimeEstimate:
    """The time of steps from the time of earlier steps of the same kind, in proportion to their size."""

    _seconds_per_unit: dict[str, float] = field(default_factory=dict)

    def observe(self, kind: str, size: int, seconds: float) -> None:
        """Take the latest step of a kind as the measure of the next ones."""
        self._seconds_per_unit[kind] = seconds / max(size, 1)

    def seconds_for(self, planned: Iterable[Planned]) -> float | None:
        """Return the seconds that these steps will take; None where one is of a kind that was not observed."""
        total = 0.0
        for kind, size in planned:
            if kind not in self._seconds_per_unit:
                return None
            total += self._seconds_per_unit[kind] * size
        return total


class RunProgress(AbstractContextManager["RunProgress"]):
    """Shows the progress of a run from a step's start on, also while that step takes long.

    Args:
        console: where it is shown.
        every_s: seconds between two lines where the console is no terminal.
    """

    def __init__(self, console: Console, every_s: float = LINE_EVERY_S) -> None:
        self._console = console
        self._every_s = every_s
        self._started = time.monotonic()
        self._current = "Starting"
        self._stop = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, name="progress", daemon=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(self._current, total=None)

    def __enter__(self) -> Self:
        """Begin to show it."""
        self._bar.start()
        if not self._console.is_terminal:
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._stop.set()
        if self._lines.is_alive():
            self._lines.join()
        self._bar.stop()

    def tell(self, title: str, completed: int = 0, total: int | None = None, left_s: float | None = None) -> None:
        """Show the step that starts now; ``left_s``: the seconds that all remaining steps take, where known."""
        steps = "" if total is None else f", step {completed + 1} of {total}"
        left = "" if left_s is None else f", about {duration(left_s)} left"
        self._current = f"{title}{steps}{left}"
        self._bar.update(self._task, description=self._current, completed=completed, total=total)

    def _print_lines(self) -> None:
        while not self._stop.wait(self._every_s):
            elapsed = duration(time.monotonic() - self._started)
            self._console.print(f"{elapsed}: {self._current}", markup=False, highlight=False)


def duration(seconds: float) -> str:
    """Return seconds in words: ``40 s``, ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
