"""The report of a GPU day: one Markdown page and one JSON file, complete after every section.

How a section's result becomes tables, and what of it counts as a failure, is decided here by the section's kind.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.gpu_day.plan import Section
from loadtest.run_progress import duration
from service.outputs import write_text

FILES = ("report.md", "report.json")

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """How a section went."""

    name: str
    kind: str

    status: str
    """``passed``, ``failed``, ``out of time`` or ``skipped``."""

    reason: str
    """Of any status but ``passed``."""

    seconds: float
    limit_s: float
    command: Sequence[str] = ()

    result: Result = field(default_factory=dict)
    """What it wrote, also where it was stopped or failed."""

    output: Sequence[str] = ()
    """The end of its output where it failed or was stopped."""

    @classmethod
    def skipped(cls, section: Section, reason: str, status: str = "skipped") -> Record:
        """Return the record of a section that was not started."""
        return cls(section.name, section.kind, status, reason, 0.0, 0.0, section.command)


def write_report(folder: Path, facts: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write both files; each replaces its predecessor by one rename."""
    data = {**facts, "sections": [asdict(record) for record in records]}
    write_text(folder / "report.json", json.dumps(data, indent=1) + "\n")
    write_text(folder / "report.md", markdown(facts, records))


def markdown(facts: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the page: the machine, an overview, the tables of each section, then everything that failed."""
    lines = ["# GPU day", "", *_bullets(facts), ""]
    lines += _table(
        ["section", "status", "time", "limit", "reason"],
        [
            [record.name, record.status, duration(record.seconds), duration(record.limit_s), record.reason]
            for record in records
        ],
    )
    for record in records:
        lines += ["", f"## {record.name}", ""]
        lines += [f"`{shlex.join(record.command)}`", ""] if record.command else []
        lines += PRESENTATIONS.get(record.kind, _bullets)(record.result)
    lines += _failures(records)
    return "\n".join(lines) + "\n"


def failures_of(kind: str, result: Result) -> dict[str, str]:
    """Return the tracebacks of the parts of a section that failed, by name."""
    if kind == "paths":
        return {
            f"{row['family']}, {row['dtype']}, {row['path']}": row["traceback"] or row["problem"]
            for row in result.get("rows", ())
            if row["problem"]
        }
    return dict(result.get("failures", {}))


def _failures(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        for name, details in failures_of(record.kind, record.result).items():
            yield from ("", f"## Failure: {record.name}: {name}", "", *_fenced(details))
        if record.output:
            yield from ("", f"## End of the output: {record.name}", "", *_fenced("\n".join(record.output)))


def _fenced(text: str) -> list[str]:
    return ["````text", text.strip("\n"), "````"]


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [list(titles), ["---"] * len(titles), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]


def _bullets(result: Result) -> list[str]:
    return [f"- {name}: {_in_words(value)}" for name, value in result.items()]


def _in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _tests(result: Result) -> list[str]:
    return _bullets({name: value for name, value in result.items() if name != "failures"})


def _paths(result: Result) -> list[str]:
    return _table(
        ["family", "dtype", "path", "difference", "tolerance", "conclusive", "changed", "largest change", "problem"],
        [
            [
                row["family"],
                row["dtype"],
                row["path"],
                *(_number(row["parity"].get(name)) for name in ("max_difference", "tolerance")),
                row["parity"].get("conclusive", ""),
                "" if row["num_changed"] is None else f"{row['num_changed']} of {row['num_items']}",
                _number(row["max_change"]),
                row["problem"],
            ]
            for row in result.get("rows", ())
        ],
    )


def _engines(result: Result) -> list[str]:
    rows = [
        [
            one["workload"],
            one["way"],
            f"{one['items_per_s']:,.1f}",
            f"{one['tokens_per_s']:,.0f}",
            f"{one['ratio']:.2f}",
            f"{one['limit_share']:.0%}",
            "" if one["busy_share"] is None else f"{one['busy_share']:.0%}",
            _number(one["comparison"]["max_difference"]),
            f"{one['comparison']['spearman']:.5f}",
        ]
        for one in result.get("findings", ())
    ]
    titles = ["work", "way", "items/s", "tokens/s", "ratio", "of limit", "busy", "largest difference", "Spearman"]
    facts = {name: result[name] for name in ("num_parameters", "machine", "versions", "limits") if name in result}
    left_out = {"left out": list(result["failures"])} if result.get("failures") else {}
    return [*_table(titles, rows), "", *_bullets(facts | left_out)]


def _rows(result: Result) -> list[str]:
    rows = [
        {**{name: value for name, value in row.items() if name != "stages_ms"}, **row.get("stages_ms", {})}
        for row in result.get("rows", ())
    ]
    return _table(list(rows[0]), [[_number(value) for value in row.values()] for row in rows]) if rows else []


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


PRESENTATIONS: Mapping[str, Callable[[Result], list[str]]] = {
    "tests": _tests,
    "paths": _paths,
    "invariance": _rows,
    "engines": _engines,
    "latency": _rows,
    "load": _rows,
}
"""By the kind of section; of others every entry is a line."""
