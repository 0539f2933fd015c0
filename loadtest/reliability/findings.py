"""What an experiment found: figures, each with the goal that it belongs to and the bound that the goal sets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from service.outputs import write_text


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure."""

    goal: str
    """R1 to R25, or ``load`` for a figure that is no goal by itself."""

    what: str
    """What was measured, with its unit."""

    value: float
    sense: Literal["at least", "at most", "none"] = "none"
    bound: float = math.nan

    @property
    def holds(self) -> bool:
        """Whether the value keeps its bound; a figure without a bound does."""
        if self.sense == "none":
            return True
        return self.value >= self.bound if self.sense == "at least" else self.value <= self.bound


def at_least(goal: str, what: str, value: float, bound: float) -> Finding:
    """Return a figure that must not be smaller than the bound."""
    return Finding(goal, what, value, "at least", bound)


def at_most(goal: str, what: str, value: float, bound: float) -> Finding:
    """Return a figure that must not be larger than the bound."""
    return Finding(goal, what, value, "at most", bound)


def table(findings: Sequence[Finding]) -> Table:
    """Return the figures for a terminal."""
    drawn = Table("goal", "measured", "figure", "bound", "")
    for one in findings:
        bound = "" if one.sense == "none" else f"{one.sense} {one.bound:,.4g}"
        drawn.add_row(one.goal, one.what, f"{one.value:,.4g}", bound, "" if one.holds else "missed")
    return drawn


def write_findings(
    file: Path, experiment: str, facts: Mapping[str, Any], seconds: float, findings: Sequence[Finding]
) -> None:
    """Write the figures as JSON; a figure that is not a number is null."""

    def plain(one: Finding) -> dict[str, Any]:
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(one).items()
        }

    report = {
        "experiment": experiment,
        **facts,
        "seconds": round(seconds, 1),
        "findings": [plain(one) | {"holds": one.holds} for one in findings],
    }
    write_text(file, json.dumps(report, indent=1) + "\n")
