"""The run of a GPU day: section after section, each with its share of the time that is left, a report after each."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.gpu_day.child import run_child
from loadtest.gpu_day.plan import ROOT, Section, plan_day, time_limit
from loadtest.gpu_day.report import Record, failures_of, write_report
from loadtest.run_progress import duration
from service.commands import INTERRUPTED

MIN_SECTION_S = 3.0
"""With less time a section is not started."""

LOG_LINES = 80
"""Lines of a failed section's output that the report has; a traceback is at the end."""


@dataclass(slots=True)
class Day:
    """What has been done so far."""

    out: Path
    facts: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Add a section's record, say how it went, and write the report."""
        self.records.append(record)
        write_report(self.out, self.facts, self.records)
        reason = f": {record.reason}" if record.reason else ""
        print(f"{record.name}: {record.status} after {duration(record.seconds)}{reason}", flush=True)


def run(options: argparse.Namespace) -> int:
    """Run the sections as the command's options say; returns the exit status."""
    options.out.mkdir(parents=True, exist_ok=True)
    day = Day(
        options.out,
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": options.device,
            "minutes": options.minutes,
        },
    )
    with tempfile.TemporaryDirectory(prefix="reward-gpu-day-") as folder:
        sections = plan_day(options.device, options.minutes, Path(folder), options.sections)
        try:
            _run_sections(day, sections, time.monotonic() + 60 * options.minutes, Path(folder))
        except KeyboardInterrupt:
            return INTERRUPTED
    print(f"The report is {options.out / 'report.md'}", flush=True)
    return int(any(record.status not in ("passed", "skipped") for record in day.records))


def _run_sections(day: Day, sections: Sequence[Section], deadline: float, folder: Path) -> None:
    stopped_by = ""
    for number, section in enumerate(sections):
        left_s = deadline - time.monotonic()
        limit_s = time_limit(left_s, [later.minutes for later in sections[number:]])
        if stopped_by:
            day.add(Record.skipped(section, f"{stopped_by} failed"))
        elif limit_s < MIN_SECTION_S:
            day.add(Record.skipped(section, "no time was left", status="out of time"))
        elif section.needs is not None and not section.needs.exists():
            day.add(Record.skipped(section, f"there is no {section.needs.name}"))
        else:
            print(f"{section.name}: at most {duration(limit_s)}", flush=True)
            record = run_section(section, limit_s, folder)
            day.add(record)
            if section.ends_the_day and record.status != "passed":
                stopped_by = section.name


def run_section(section: Section, limit_s: float, folder: Path) -> Record:
    """Run one section and return its record, with what it had written where it was stopped or failed."""
    log = folder / "section.log"
    end = run_child(section.command, child_environment(), log, limit_s)
    result = read_result(section.result)
    reason = str(result.get("skipped", ""))
    failures = failures_of(section.kind, result)
    if end.timed_out:
        status, reason = "out of time", f"stopped after {duration(limit_s)}"
    elif end.status:
        status, reason = "failed", f"exit status {end.status}"
    elif reason:
        status = "skipped"
    else:
        status, reason = ("failed", f"{len(failures)} parts failed") if failures else ("passed", "")
    output = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if status in ("failed", "out of time") else []
    return Record(
        name=section.name,
        kind=section.kind,
        status=status,
        reason=reason,
        seconds=end.seconds,
        limit_s=limit_s,
        command=section.command,
        result=result,
        output=output,
    )


def child_environment() -> dict[str, str]:
    """Return the environment of the sections: a clone is enough, nothing of it need be installed."""
    paths = [str(ROOT), str(ROOT / "client"), str(ROOT / "tests" / "support")]
    if existing := os.environ.get("PYTHONPATH"):
        paths.append(existing)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def read_result(file: Path) -> dict[str, Any]:
    """Return what a section has written so far; nothing where there is no complete file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
