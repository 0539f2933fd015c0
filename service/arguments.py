"""Command lines: errors in one line, help in colour on a terminal, and types that check arguments.

All of it works before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from service.version import add_version_option

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

_HEADING = re.compile(r"^(usage(?=:)|\S[^\n]*(?=:$))", re.MULTILINE)
_OPTION = re.compile(r"^(  -.*?)(?=  |$)", re.MULTILINE)
_BOLD, _CYAN, _PLAIN = "\x1b[1m", "\x1b[36m", "\x1b[0m"


class CommandParser(argparse.ArgumentParser):
    """A parser with ``--version`` whose errors are one sentence (exit status 2), without a page of usage.

    Options are not abbreviated, so that a new option never changes the meaning of a script.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        add_version_option(self)

    stray_values = "the command line has {count} more values than {prog} takes"
    """What is said about values that belong to no option."""

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Write the help; headings and options are coloured where the file is a terminal."""
        out = sys.stdout if file is None else file
        text = self.format_help()
        out.write(coloured_help(text) if shows_colours(out) else text)

    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line; for an unknown option the nearest one that exists is suggested."""
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            self.refuse(unknown)
        return given

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End the command because of arguments that it does not have; values are not repeated."""
        names = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        if not names:
            self.error(self.stray_values.format(count=len(unknown), prog=self.prog))
        known = [option for action in self._actions for option in action.option_strings]
        self.error("; ".join(f"there is no option {name}{_nearest(name, known)}" for name in names))


def shows_colours(file: SupportsWrite[str]) -> bool:
    """Whether a file is a terminal with colours: `NO_COLOR <https://no-color.org>`_ and ``TERM=dumb`` ask for none."""
    is_terminal = getattr(file, "isatty", bool)()
    return bool(is_terminal) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured_help(text: str) -> str:
    """Return a help text with bold headings and coloured options; its letters and widths are unchanged."""
    return _OPTION.sub(rf"{_CYAN}\1{_PLAIN}", _HEADING.sub(rf"{_BOLD}\1{_PLAIN}", text))


def device(text: str) -> str:
    """Return the name of a device.

    Raises:
        ArgumentTypeError: it is none of auto, cpu, cuda and cuda:N.
    """
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError("use auto, cpu, cuda or cuda:N")
    return text


def whole_number(minimum: int) -> Callable[[str], int]:
    """Return a type of arguments: an integer that is not smaller than ``minimum``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < minimum:
            raise argparse.ArgumentTypeError(f"give a whole number of at least {minimum}")
        return number

    return parse


def number_between(minimum: float, maximum: float) -> Callable[[str], float]:
    """Return a type of arguments: a finite number from ``minimum`` to ``maximum``."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not minimum <= number <= maximum or number == float("inf"):
            bounds = f"from {minimum:g} to {maximum:g}" if maximum < float("inf") else f"of at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"give a number {bounds}")
        return number

    return parse


def named_weight(text: str) -> tuple[str, float]:
    """Return name and weight of an argument ``NAME=WEIGHT``.

    Raises:
        ArgumentTypeError: it has no name, or the weight is no finite number.
    """
    name, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise argparse.ArgumentTypeError("it must be NAME=WEIGHT, where the weight is a finite number")
    return name, value


def not_empty(text: str) -> str:
    """Return an argument that is not empty, as it would be from an unset variable of a shell script.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
