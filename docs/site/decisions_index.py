"""The list of decisions, from the titles of their pages."""

from __future__ import annotations

from pathlib import Path

from docs.site.markdown import page, table

FOLDER = Path(__file__).parents[1] / "decisions"


def decisions_index() -> str:
    """Return the page."""
    rows = []
    for file in sorted(FOLDER.glob("[0-9]*.md")):
        number, _, title = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(": ")
        rows.append((f"[{number}]({file.name})", title))
    return page(
        "Decisions",
        "Each page has the question, the choice, the measurement behind it, what was rejected, and what would make us "
        "reopen it. A decision that no longer holds is superseded by another page, not rewritten.",
        table(("number", "decision"), rows),
    )
