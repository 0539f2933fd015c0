"""Sums of blocks and the summary, against independent computations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from scoring.blocks import InputRow
from scoring.selection import Selection, select, selection
from scoring.statistics import Statistics, statistics_of, summary_lines
from service.data.prompts import PromptCompletions


def pair(prompt: str, chosen: float, rejected: float, **added: Any) -> tuple[InputRow, dict[str, Any]]:
    row = InputRow("a.jsonl", 1, {}, PromptCompletions(prompt, ("yes", "no")))
    rewards = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}
    return row, rewards | added


def sums(*rows: tuple[InputRow, dict[str, Any]]) -> Statistics:
    return statistics_of([row for row, _ in rows], [added for _, added in rows])


def random_pairs(count: int, num_prompts: int, seed: int = 0) -> list[tuple[InputRow, dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        chosen, rejected = rng.normal(size=2)
        lengths = rng.integers(1, 200, size=2)
        rows.append(
            pair(
                f"prompt {n % num_prompts}",
                float(chosen) + 0.5,
                float(rejected),
                chosen_length_completion_tokens=int(lengths[0]),
                rejected_length_completion_tokens=int(lengths[1]),
                chosen_ood_p_value=float(rng.uniform()),
                rejected_ood_p_value=float(rng.uniform()),
            )
        )
    return rows


def test_accuracy_of_different_prompts_has_wilsons_interval() -> None:
    """The interval is scipy's, and a tie is half a win."""
    rows = [*random_pairs(60, 60), pair("tie", 1.0, 1.0), pair("other tie", 2.0, 2.0)]
    wins = sum(added["margin"] > 0 for _, added in rows)

    accuracy = sums(*rows).pairs.accuracy()

    expected = stats.binomtest(wins + 1, 62).proportion_ci(method="wilson")
    assert accuracy == pytest.approx(((wins + 1) / 62, expected.low, expected.high))


def test_pairs_that_repeat_a_prompt_widen_the_interval() -> None:
    """Ten copies of each of 40 pairs say as much as the 40 pairs, up to the small-sample factor of the variance."""
    once = random_pairs(40, 40)

    single = sums(*once).pairs.accuracy()
    copied = sums(*[row for row in once for _ in range(10)]).pairs.accuracy()

    assert single is not None
    assert copied is not None
    assert copied[0] == pytest.approx(single[0])
    assert copied[2] - copied[1] == pytest.approx(single[2] - single[1], rel=0.03)


def test_correlations_are_those_of_all_items() -> None:
    """Merging blocks gives the correlation of reward and log length of all items together."""
    rows = random_pairs(100, 100)
    merged = sums(*rows[:30]).merged(sums(*rows[30:31])).merged(sums(*rows[31:]))

    points = [
        (np.log1p(added[f"{side}_length_completion_tokens"]), added[f"{side}_reward"])
        for _, added in rows
        for side in ("chosen", "rejected")
    ]
    expected = np.corrcoef(np.array(points).T)[0, 1]

    assert merged.length.count == 200
    line = next(line for line in summary_lines(merged, length_unit="tokens") if line.startswith("correlation"))
    assert float(line.split(": ")[1].split()[0]) == pytest.approx(expected, abs=0.0006)


def test_rates_of_p_values_are_counted() -> None:
    """P-values below each level are counted, those equal to it are not."""
    total = sums(pair("a", 1.0, 0.0, chosen_ood_p_value=0.005, rejected_ood_p_value=0.05), pair("b", 1.0, 0.0))

    assert (total.num_p_values, total.num_below) == (2, (1, 1))
    assert "out of distribution: 50.00% with p < 0.01, 50.00% with p < 0.05, of 2 items" in summary_lines(
        total, length_unit="tokens"
    )


def test_sums_survive_being_stored() -> None:
    """Read from JSON again, they merge to the same summary."""
    total = sums(*random_pairs(50, 10), (InputRow("a", 2, {}, None), {"error_code": "malformed_row"}))

    stored = Statistics.from_json(json.loads(json.dumps(total.as_json())))

    assert summary_lines(stored.merged(Statistics()), length_unit="tokens") == summary_lines(
        total, length_unit="tokens"
    )
    assert stored.errors == {"malformed_row": 1}


def test_selection_is_over_all_blocks_and_the_earlier_row_wins_a_tie() -> None:
    """The best of a prompt may be in any block; ranks count from 1."""
    candidates = {(0, 0): [("p", 0, 1.0), ("q", 1, 5.0)], (0, 1): [("p", 0, 3.0), ("p", 2, 1.0)]}

    assert select(candidates, Selection(1)) == {(0, 0): {1: 1}, (0, 1): {0: 1}}
    assert select(candidates, Selection(2)) == {(0, 0): {1: 1, 0: 2}, (0, 1): {0: 1}}
    assert select(candidates, Selection(1, lowest=True)) == {(0, 0): {0: 1, 1: 1}, (0, 1): {}}


@pytest.mark.parametrize("text", ["best", "worst", "top-k:4"])
def test_selections_are_written_as_they_are_read(text: str) -> None:
    """A job's settings name the selection as the command line did."""
    assert str(selection(text)) == text
