"""Arguments that name an objective, or a family of contrast pairs, and its weight.

Of the standard library alone, so ``--help`` comes at once.
"""

from __future__ import annotations

import argparse
import math
import re

NAME_RULE = "1 to 64 of A-Z a-z 0-9 _ . -"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def parse_objective(text: str) -> tuple[str, float | None]:
    """Return name and weight of an objective, ``NAME`` or ``NAME=WEIGHT``.

    Raises:
        argparse.ArgumentTypeError: the name has other characters, or the weight is no finite number.
    """
    return _parse_weighted(text, "an objective")


def parse_family(text: str) -> tuple[str, float | None]:
    """Return name and weight of a family of contrast pairs, see `parse_objective`."""
    return _parse_weighted(text, "a family")


def _parse_weighted(text: str, what: str) -> tuple[str, float | None]:
    name, equals, weight = text.partition("=")
    if not _NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f"the name of {what} is {NAME_RULE}")
    if not equals:
        return name, None
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"the weight of {name} is not a finite number")
    return name, value
