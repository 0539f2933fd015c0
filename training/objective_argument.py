"""The argument that names an objective and its weight; of the standard library alone, so ``--help`` comes at once."""

from __future__ import annotations

import argparse
import math
import re

NAME_RULE = "1 to 64 of A-Z a-z 0-9 _ . -"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def parse_objective(text: str) -> tuple[str, float | None]:
    """Return name and weight of an argument ``NAME`` or ``NAME=WEIGHT``.

    Raises:
        argparse.ArgumentTypeError: the name has other characters, or the weight is no finite number.
    """
    name, equals, weight = text.partition("=")
    if not _NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f"the name of an objective is {NAME_RULE}")
    if not equals:
        return name, None
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"the weight of {name} is not a finite number")
    return name, value
