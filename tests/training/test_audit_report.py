"""The report is one page that loads nothing, figures as JSON and pictures, without texts where they are hidden."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from scored_examples import audited, human_pairs, scored_by

from service.records import Exchange
from training.audit.report import as_json, render_html, write_report
from training.preferences import PreferencePair

MARK = "canary-4c1d"
PICTURES = (
    "accuracy_by_length",
    "accuracy_by_source",
    "length",
    "overtraining",
    "reliability",
    "rewards",
    "style",
)


def reward(exchange: Exchange) -> float:
    return len(exchange.completion) * 0.01


def marked_pairs() -> list[PreferencePair]:
    completion = f"{MARK} <script>alert(1)</script> " + "fox " * 200
    marked = PreferencePair(f"{MARK} <b>asked</b>", completion, "no", id="marked")
    return [marked, *human_pairs(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = marked_pairs()
    training = human_pairs(40, seed=1, prefix="training")
    found = audited(reward, pairs, trained=scored_by(reward, training), train_pairs=training)
    return write_report(found, tmp_path_factory.mktemp("audit")).parent


class Links(HTMLParser):
    """Collects everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]
        assert tag not in {"script", "link", "iframe", "object"}


def test_the_page_loads_nothing(folder: Path) -> None:
    """All pictures are embedded; there is no script, no linked stylesheet and no other address."""
    page = (folder / "audit.html").read_text()
    links = Links()
    links.feed(page)

    assert len(links.found) == 7
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found)
    assert not re.search(r"url\(|@import", page)


def test_the_page_shows_the_findings(folder: Path) -> None:
    """Conclusions, numbers and the ten highest completions in full, with markup in them escaped."""
    page = (folder / "audit.html").read_text()

    for words in (
        "Measures mostly length",
        "longer answer wins",
        "The ten highest rewards",
        "same prompt as one of 40",
    ):
        assert words in page
    assert f"{MARK} &lt;script&gt;alert(1)" in page
    assert page.count('class="card completion"') == 10


def test_the_numbers_are_json(folder: Path) -> None:
    """The file is strict JSON with summary and conclusions first and without the data."""
    found = json.loads((folder / "audit.json").read_text())

    assert list(found)[:2] == ["summary", "conclusions"]
    assert found["accuracy"]["num_pairs"] == 61
    assert found["model"]["name"] == "example"
    assert {"scored", "completions"}.isdisjoint(found)


def test_pictures_are_written_as_files(folder: Path) -> None:
    """There is one PNG for each picture, and an overview of the four most important ones."""
    names = {path.stem for path in (folder / "pictures").glob("*.png")}

    assert names == {*PICTURES, "overview"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (folder / "pictures").iterdir())


def test_hidden_texts_are_nowhere() -> None:
    """A report without texts has no word of prompts and completions, only ids, lengths and remarks."""
    found = audited(reward, marked_pairs(), hide_texts=True)

    written = render_html(found, dict.fromkeys(PICTURES, Figure())) + json.dumps(as_json(found))

    assert MARK not in written
    assert "fox fox" not in written
    assert "marked" in written


def test_figures_without_data_are_null() -> None:
    """JSON has no NaN: the accuracy of an empty bucket is null."""
    found = as_json(audited(reward, [PreferencePair(f"p{n}", "long enough " * 4, "no", id=str(n)) for n in range(30)]))

    buckets = found["accuracy"]["by_length_ratio"]
    assert buckets[0]["accuracy"] == {"value": None, "low": None, "high": None}
    json.dumps(found, allow_nan=False)
