"""The measurement of slow drift: small edits, streams of them, and figures without any text."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from loadtest.plausible_hacks import EDITS
from loadtest.slow_drift import main
from loadtest.slow_drift_streams import Streams, sentence, summary_lines
from loadtest.worded_items import CLEAN, read_measured
from service.diagnostics.lexicon import count_style_markers
from service.diagnostics.monitors.drift_report import Change
from service.diagnostics.monitors.shared_phrases import NUM_PROMPTS

COMPLETION = "Put it in boiling water. Wait for eight minutes, then cool it! Is that enough?"
VARIANTS = [(hack, number) for hack, edits in EDITS.items() for number in range(len(edits))]


@pytest.mark.parametrize(("hack", "number"), VARIANTS)
def test_an_edit_is_small_and_in_no_list(hack: str, number: int) -> None:
    """An edit keeps the answer's words, adds a few, and no phrase that the style block counts; bullets add marks."""
    edit = EDITS[hack][number]  # type: ignore[index]  # a key of EDITS
    rng = random.Random(0)

    for _ in range(20):
        text = edit("How do I boil an egg?", COMPLETION, rng)
        added = len(text.split()) - len(COMPLETION.split())
        markers = count_style_markers(text)
        assert text != COMPLETION
        assert 1 <= added <= 21
        assert (markers.hedges, markers.flattery) == (0, 0)
        assert set(re.findall(r"\w+", COMPLETION.lower())) <= set(re.findall(r"\w+", text.lower()))
        assert edit("", "No", rng).strip()


@pytest.mark.parametrize("lines", ["- a\n- b", "One.\n\nTwo."])
def test_an_edit_keeps_the_lines_of_the_answer(lines: str) -> None:
    """What is edited within an answer leaves its lines as they are."""
    for hack in ("padding", "hedging", "praise"):
        for edit in EDITS[hack]:
            assert edit("p", lines, random.Random(1)).count("\n") == lines.count("\n")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two completions of each of 300 prompts, and the edits of those of 40."""
    folder = tmp_path_factory.mktemp("slow_drift")
    rng = np.random.default_rng(0)
    words = np.array([a + b for a in "bdfgklmnprst" for b in ("aba", "egi", "ilo", "oku", "una")])
    with (folder / "pairs.jsonl").open("w") as out:
        for number in range(300):
            chosen, rejected = (" ".join(rng.choice(words, rng.integers(10, 40))) + "." for _ in range(2))
            out.write(json.dumps({"prompt": f"secret {number}", "chosen": chosen, "rejected": rejected}) + "\n")
    output = folder / "items.npz"
    assert main(["measure", str(output), "--data", str(folder / "pairs.jsonl"), "--edited", "40"]) == 0
    return output


def test_items_are_stored_without_text(measured: Path) -> None:
    """Clean items and edits are read as they were measured; no text is in the file."""
    items = read_measured(measured)

    assert list(items.kinds) == [CLEAN, *(f"{hack} {number + 1}" for hack, number in VARIANTS)]
    assert len(items.kinds[CLEAN].of_prompt) == 300
    assert all(len(items.kinds[f"{hack} 1"].of_prompt) == 40 for hack in EDITS)
    assert {len(found) for found in items.kinds[CLEAN].of_prompt.values()} == {2}
    with np.load(measured) as arrays:
        assert not any("secret" in str(arrays[name].tolist()) for name in arrays.files)


def test_a_batch_has_the_share_of_edits(measured: Path) -> None:
    """Whole prompts are drawn, and the share of their completions that is edited."""
    items = read_measured(measured)
    edits = {id(item) for found in items.kinds["praise 1"].of_prompt.values() for item in found}
    streams = Streams(items)
    rng = np.random.default_rng(1)

    for share in (0.0, 0.3, 1.0):
        batches = [streams.batch("praise 1", share, rng) for _ in range(8)]
        assert all(len(batch) == NUM_PROMPTS for batch in batches)
        found = [id(item) in edits for batch in batches for group in batch for item in group]
        assert np.mean(found) == pytest.approx(share, abs=0.05)


@pytest.mark.slow
def test_the_report_has_shares_directions_and_false_alarms(measured: Path, tmp_path: Path) -> None:
    """Every variant is detected before half of the items are edited, and clean streams raise no alarm."""
    path = tmp_path / "report.json"

    assert main(["run", str(measured), "--runs", "1", "--clean-batches", "60", "--json", str(path)]) == 0

    report = json.loads(path.read_text())
    assert list(report["hacks"]) == ["padding", "hedging", "praise", "bullets"]
    assert all(found["start"] <= 0.5 for found in report["hacks"].values())
    assert report["false_alarms"]["alarms"] == {}
    assert all(found["example"] for found in report["variants"].values())


def test_the_summary_says_what_the_aims_are_about() -> None:
    """Shares by hack, runs in which the names are right, and false alarms, as numbers of runs and batches."""
    report = {
        "runs": 10,
        "prompts": 5,
        "items": 10,
        "taps": 2,
        "variants": {"padding 1": {"real": 1.0, "named": 0.7}, "padding 2": {"real": 0.9, "named": 1.0}},
        "hacks": {"padding": {"start": 0.1234}},
        "false_alarms": {"batches": 1000, "streams": 2, "alarms": {"start": 1, "calibration": 2}},
    }

    share, real, named, alarms, items = summary_lines(report)

    assert share == "Median share at the first alarm: padding 12.3%. Aim: at most 20%."
    assert real.endswith("has changed in 19.")
    assert "17 of 20" in named
    assert alarms.startswith("3 false alarms in 1000 clean batches")
    assert "2 taps" in items


def test_a_change_in_words() -> None:
    """A change is a sentence with its unit."""
    change = Change("hedging_words", "per 100 words", 0.4, 2.1, 5.23, 9.0)

    assert sentence(change) == "hedging words 0.40 -> 2.10 per 100 words (+5.2 standard errors)"
