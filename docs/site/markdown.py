"""Parts of Markdown pages that programs write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NOTICE = "<!-- written by python -m docs.site.generated; do not edit -->"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; pipes and line ends of its cells are escaped."""
    lines = [heads, ["--"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def page(title: str, *parts: str) -> str:
    """Return a page of a title and parts, with the notice that a program has written it."""
    return "\n\n".join([f"# {title}", NOTICE, *parts]) + "\n"


def sentence(docstring: str | None) -> str:
    """Return the first paragraph of a docstring in one line; the double backquotes of names become single ones."""
    paragraph = (docstring or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split()).replace("``", "`")


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as hosts of repositories and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
