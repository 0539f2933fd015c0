"""Reading and splitting the data of a calibration, and measuring on it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_calibration import write_pairs

from export.calibration.data import prompt_numbers, read_items, split
from export.calibration.measure import detection, length_correlations, out_of_fold_p, rate_of, self_test
from service.errors import DatasetError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_items_or_pairs(tmp_path: Path) -> None:
    """A pair gives two items of one prompt; test rows have a category; a flag may be written as in a CSV file."""
    write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"})
    write(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": "q"}], "completion": "x", "group": 3})
    (tmp_path / "c.csv").write_text("prompt,response,category,is_ood\np,y,odd,True\np,z,,False\n")

    items = list(read_items(tmp_path))

    assert [item.exchange.completion for item in items] == ["c", "r", "x", "y", "z"]
    assert prompt_numbers([item.exchange for item in items]) == [0, 0, 1, 0, 0]
    assert (items[2].group, items[3].category, items[3].is_ood) == ("3", "odd", True)
    assert (items[4].category, items[4].is_ood) == ("", False)


@pytest.mark.parametrize("row", [{"prompt": "p"}, {"prompt": [], "completion": "c"}, {"prompt": "p", "completion": 1}])
def test_other_rows_are_refused_by_location(tmp_path: Path, row: object) -> None:
    """The message names the row and never its text."""
    with pytest.raises(DatasetError, match="row 1"):
        list(read_items(write(tmp_path / "a.jsonl", row)))


def test_no_prompt_is_in_two_parts(tmp_path: Path) -> None:
    """Parts are disjoint by the prompts' openings, together they contain every item, and none is too small."""
    items = list(read_items(write_pairs(tmp_path / "pairs.jsonl", 400)))

    parts = split(items)

    openings = [{item.opening for item in members} for members in parts.values()]
    assert sum(map(len, openings)) == len(set.union(*openings)) == 400
    assert sum(map(len, parts.values())) == len(items)
    assert all(len(members) > 60 for members in parts.values())


def test_detection_by_hand() -> None:
    """The share of pairs of a clean and a hacked item in the right order; ties count one half."""
    found = detection(np.array([1.0, 2.0, 3.0]), np.array([3.0, 4.0, 2.5]))

    assert found.auroc == pytest.approx((3 + 2.5 + 2) / 9 + 0.0, abs=1 / 9)
    assert found.num_items == 3


def test_errors_count_prompts() -> None:
    """Items that always agree within a prompt have no more information than one item per prompt."""
    rng = np.random.default_rng(0)
    alone = rng.random(2000) < 0.05
    apart = rate_of(alone, np.arange(2000), 0.05)
    together = rate_of(np.repeat(alone[:500], 4), np.repeat(np.arange(500), 4), 0.05)

    assert apart.standard_error == pytest.approx(math.sqrt(0.05 * 0.95 / 2000), rel=0.2)
    assert together.standard_error == pytest.approx(math.sqrt(0.05 * 0.95 / 500), rel=0.3)
    assert apart.is_tolerable


def test_out_of_fold_p_values_are_uniform() -> None:
    """Ranks among items of other prompts have the nominal rate, and the self-test confirms it."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=2000)

    found = self_test(out_of_fold_p(scores, np.repeat(np.arange(1000), 2), seed=0), np.repeat(np.arange(1000), 2))

    assert all(rate.is_tolerable for rate in found.rates)
    assert found.ks_p > 0.01
    assert found.design_effect == pytest.approx(1.0, abs=0.5)


def test_length_correlation_within_prompts() -> None:
    """A correlation between prompts only does not appear within them."""
    lengths = np.repeat([1.0, 2.0, 3.0, 4.0], 2) + np.tile([0.0, 0.5], 4)
    rewards = np.repeat([1.0, 2.0, 3.0, 4.0], 2) - np.tile([0.0, 0.1], 4)

    found = length_correlations(rewards, lengths, np.repeat(np.arange(4), 2))

    assert found.pooled > 0.9
    assert found.within == pytest.approx(-1.0)
