"""What an audit writes: a page that needs nothing else, numbers for programs, pictures, and no stray text."""

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
    """All pictures are inside; there is no script, no stylesheet and no address of anything else."""
    page = (folder / "audit.html").read_text()
    links = Links()
    links.feed(page)

    assert len(links.found) == 7
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found)
    assert not re.search(r"url\(|@import", page)


def test_the_page_says_what_was_found(folder: Path) -> None:
    """Verdicts, numbers and the ten highest completions in full, with markup in them shown and not obeyed."""
    page = (folder / "audit.html").read_text()

    for words in ("Length detector", "longer answer wins", "The ten highest rewards", "same prompt as one of 40"):
        assert words in page
    assert f"{MARK} &lt;script&gt;alert(1)" in page
    assert page.count('class="card completion"') == 10


def test_the_numbers_are_json(folder: Path) -> None:
    """Strict JSON with the verdicts first and no array of rows."""
    found = json.loads((folder / "audit.json").read_text())

    assert next(iter(found)) == "verdicts"
    assert found["accuracy"]["num_pairs"] == 61
    assert found["model"]["name"] == "example"
    assert {"scored", "completions"}.isdisjoint(found)


def test_pictures_are_there_alone_too(folder: Path) -> None:
    """A PNG each, and one of the four that say most."""
    names = {path.stem for path in (folder / "pictures").glob("*.png")}

    assert names == {*PICTURES, "overview"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (folder / "pictures").iterdir())


def test_hidden_texts_are_nowhere() -> None:
    """A report that may be published holds no word of prompts and completions, only ids, lengths and tells."""
    found = audited(reward, marked_pairs(), hide_texts=True)

    written = render_html(found, dict.fromkeys(PICTURES, Figure())) + json.dumps(as_json(found))

    assert MARK not in written
    assert "fox fox" not in written
    assert "marked" in written


def test_what_could_not_be_measured_is_null() -> None:
    """JSON has no NaN: an empty bucket has an accuracy of null."""
    found = as_json(audited(reward, [PreferencePair(f"p{n}", "long enough " * 4, "no", id=str(n)) for n in range(30)]))

    buckets = found["accuracy"]["by_length_ratio"]
    assert buckets[0]["accuracy"] == {"value": None, "low": None, "high": None}
    json.dumps(found, allow_nan=False)
