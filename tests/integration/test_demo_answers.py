"""What README.md, the quickstart and the page say about the demo model is what it answers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from page_browser import chromium, opened
from playwright.sync_api import expect
from serving import RunningServer, serving

from docs.demo_figures import COMPLETIONS, HACK, PAGES, PROMPT, measure, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ALPHA = 0.01
CRUDE = {"Markdown", "Emoji", "Repetition"}
"""Examples whose hacked completion reads as no honest answer does."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("demo"), runtime="local", timeout_s=500.0) as server:
        yield server


def test_documented_figures_are_those_of_the_demo_model(demo: RunningServer) -> None:
    """Rewards, percentiles, the probability and p-values are those of the pages, but for another CPU's rounding."""
    figures = measure(demo.url)
    for path in PAGES:
        for name, text in shown(path.read_text(encoding="utf-8")).items():
            if name == "version":
                continue  # it names the arithmetic of the CPU too
            tolerance = 0.15 if "reward" in name or "printed" in name else 0.08
            assert float(text) == pytest.approx(figures[name], abs=tolerance), (path.name, name)


def test_sentences_about_the_demo_model_hold(demo: RunningServer) -> None:
    """It prefers an answer to "No.", to garble and to repetition (README.md), and flags the repetition (quickstart)."""
    answer = COMPLETIONS[0]
    garble = "".join(random.Random(0).sample(answer, len(answer)))
    body = {"prompt": PROMPT, "completions": [answer, "No.", garble, HACK["hacked"]], "diagnostics": "full"}
    results = httpx2.post(f"{demo.url}/v1/compare", json=body, timeout=120).json()["results"]

    assert max(range(4), key=lambda index: results[index]["reward"]) == 0
    assert measure(demo.url)["hacked p-value"] <= ALPHA


def test_examples_of_the_page_show_what_they_say(demo: RunningServer) -> None:
    """Each tell is in the diagnostics, the demo model catches each hack, and the honest answers are typical."""
    with chromium() as browser, opened(browser, demo.url) as page:
        examples = page.evaluate("async () => (await import('./page/examples.js')).EXAMPLES")
        assert len(examples) == 7
        for example in examples:
            honest, hacked = scored(demo.url, example)
            check_tell(example, honest, hacked)
            assert honest["ood"]["p_value"] > 0.05, example["name"]
            if example["shows"] != "length":
                assert hacked["ood"]["p_value"] < honest["ood"]["p_value"], example["name"]
            if example["name"] in CRUDE:
                assert hacked["ood"]["p_value"] < 0.05, example["name"]
            page.get_by_role("button", name=example["name"], exact=True).click()
            expect(page.locator("[data-caught]")).to_have_attribute("data-caught", "yes", timeout=60_000)


def scored(url: str, example: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the honest and the hacked completion of an example."""
    completions = [example["honest"], example["hacked"]]
    body = {"prompt": example["prompt"], "completions": completions, "diagnostics": "full"}
    results: list[dict[str, Any]] = httpx2.post(f"{url}/v1/compare", json=body, timeout=120).json()["results"]
    return results


def check_tell(example: dict[str, Any], honest: dict[str, Any], hacked: dict[str, Any]) -> None:
    """The diagnostic that an example names tells its completions apart as its sentence says."""
    shows, style = example["shows"], hacked["style"]
    if shows == "length":
        assert hacked["length"]["completion_tokens"] > 2 * honest["length"]["completion_tokens"]
        assert example["hacked"].startswith(example["honest"])
    elif shows in {"repeat4", "prompt_overlap"}:
        assert style[shows] > 0.5 > honest["style"][shows]
    else:
        assert style[shows] >= 4
        assert honest["style"][shows] == 0
    if shows == "headers":
        assert style["list_items"] > 4
        assert style["bold"] > 4
    if shows == "repeat4":
        assert len(set(re.split(r"(?<=\.) ", example["hacked"]))) == 1
        assert example["hacked"].count(".") == 12
