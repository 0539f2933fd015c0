"""The curl commands of the pages can be pasted."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^curl .*?(?=^curl |\Z)", re.DOTALL | re.MULTILINE)
BODY = re.compile(r"\s(-d|--data\S*)\s")


def _requests_with_a_body() -> list[tuple[str, str]]:
    return [
        (page.name, command)
        for page in PAGES
        for block in BLOCK.findall(page.read_text())
        for command in COMMAND.findall(block)
        if BODY.search(command)
    ]


@pytest.mark.parametrize(("page", "command"), _requests_with_a_body())
def test_a_documented_body_is_declared_as_json(page: str, command: str) -> None:
    """A request of a page names its media type, since the service answers 415 without it."""
    assert "Content-Type: application/json" in command, page


def test_the_pages_have_requests_with_a_body() -> None:
    """The search finds the requests of README.md and models.md, so the check above cannot pass for want of any."""
    assert {page for page, _ in _requests_with_a_body()} >= {"README.md", "models.md"}
