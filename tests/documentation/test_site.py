"""The documentation site: it builds without a warning, asks no other host for anything, and its search finds things."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from first_steps import ROOT
from page_browser import chromium
from playwright.sync_api import Browser, expect

pytestmark = pytest.mark.slow

QUERIES = {
    "Retry-After": ("retry", "after"),
    "calibration missing": ("calibration", "missing"),
    "prompt_left": ("prompt_left",),
}
"""What a reader types, and the words of which each result has at least one."""

_ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b[^>]*\shref=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import\s+["'](?:https?:)?//""",
    re.IGNORECASE,
)
"""What makes a browser ask another host: scripts, style sheets, pictures; a link to follow does not."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it; a dead link, a dead anchor or a page without a place ends the build."""
    folder = tmp_path_factory.mktemp("site")
    for command in (
        [sys.executable, "-m", "docs.site.pages", "build/site-pages"],
        [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--clean", "--site-dir", str(folder)],
    ):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def test_no_page_asks_another_host(site: Path) -> None:
    """Scripts, style sheets, fonts and pictures of all pages are in the site."""
    pages = [path for path in site.rglob("*") if path.suffix in {".html", ".css"}]

    assert len(pages) > 50
    assert not [path.name for path in pages if _ELSEWHERE.search(path.read_text(encoding="utf-8"))]


def test_the_reference_of_the_client_is_made_from_its_docstrings(site: Path) -> None:
    """Classes, their methods and the exceptions are on the page of the client."""
    page = (site / "reference" / "client.html").read_text(encoding="utf-8")

    for name in ("RewardClient", "RewardClient.score", "AsyncRewardClient.compare", "ItemsFailed"):
        assert re.search(rf'id="[\w.]*\b{re.escape(name)}"', page), name


@pytest.mark.parametrize("query", QUERIES)
def test_the_index_has_what_readers_look_for(site: Path, query: str) -> None:
    """Some section has all words of each query."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))

    assert [entry["location"] for entry in index["docs"] if query.lower() in _words(entry["text"])] or [
        entry["location"]
        for entry in index["docs"]
        if all(word in _words(entry["title"] + " " + entry["text"]) for word in QUERIES[query])
    ]


def _words(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html).lower()


def test_the_search_finds_it_without_a_server_or_a_network(site: Path, browser: Browser) -> None:
    """In pages that are opened from the file system the search has results, and no other host is asked."""
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    page.goto((site / "index.html").as_uri())
    box = page.locator("[data-md-component=search-query]")
    for query, words in QUERIES.items():
        box.click()
        box.press_sequentially(query)
        results = page.locator(".md-search-result__item")
        expect(results.first).to_be_visible(timeout=20_000)
        expect(results.first).to_contain_text(re.compile("|".join(words), re.IGNORECASE))
        box.fill("")
    results_of_nothing = page.locator(".md-search-result__item")
    box.press_sequentially("xylophone")
    expect(results_of_nothing).to_have_count(0)
    context.close()
    assert problems == []
