"""Runs the tests that are marked ``gpu`` and writes the outcome of each; skipped where pytest is not complete."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, parse  # nosec B405 - the report is pytest's own

from loadtest.gpu_day.plan import ROOT
from service.outputs import write_text

PLUGINS = ("pytest", "pytest_asyncio", "pytest_randomly", "pytest_timeout", "hypothesis")
"""Without which the tests' configuration is refused."""

MARK = "pytest.mark.gpu"
TEST_TIMEOUT_S = 120


def main() -> int:
    """Run the tests; the exit status is pytest's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    reason = why_skipped()
    if reason:
        write_text(options.json, json.dumps({"skipped": reason}))
        return 0

    import pytest

    report = options.json.with_suffix(".xml")
    arguments = ["-m", "gpu", "-v", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    arguments += [f"--timeout={TEST_TIMEOUT_S}", f"--rootdir={ROOT}", f"--junitxml={report}"]
    try:
        status = int(pytest.main([*arguments, *map(str, marked_files(ROOT / "tests"))]))
    finally:
        if report.exists():
            write_text(options.json, json.dumps(read_outcomes(report)))
    return status


def why_skipped() -> str:
    """Return why the tests cannot run here; empty where they can."""
    missing = [name for name in PLUGINS if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    return "" if (ROOT / "tests").is_dir() else "the tests are in a clone of the repository only"


def marked_files(folder: Path) -> list[Path]:
    """Return the files with marked tests; others may import what this machine lacks."""
    return sorted(file for file in folder.rglob("test_*.py") if MARK in file.read_text(encoding="utf-8"))


def read_outcomes(report: Path) -> dict[str, Any]:
    """Return the number of tests by outcome, and the tracebacks of those that failed, from pytest's XML report."""
    cases = list(parse(report).getroot().iter("testcase"))  # noqa: S314  # nosec B314 - pytest's own
    outcomes = [_outcome(case) for case in cases]
    return {
        "passed": outcomes.count("passed"),
        "failed": outcomes.count("failed"),
        "skipped_tests": outcomes.count("skipped"),
        "failures": {
            f"{case.get('classname')}.{case.get('name')}": _traceback(case)
            for case, outcome in zip(cases, outcomes, strict=True)
            if outcome == "failed"
        },
        "reasons": sorted({str(skip.get("message")) for case in cases for skip in case.iter("skipped")}),
    }


def _outcome(case: Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"


def _traceback(case: Element) -> str:
    return "\n".join(one.text or "" for tag in ("failure", "error") for one in case.iter(tag))


if __name__ == "__main__":
    sys.exit(main())
