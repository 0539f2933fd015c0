"""Whether a figure of uncertainty predicts wrong pairs: AUROC and error-retention curve."""

from __future__ import annotations

import numpy as np
import pytest

from export.calibration.pair_uncertainty import MAIN_FIGURE, RETAINED, measure_pairs, retained_errors, retention_area
from service.records import OodReport, Score

NUM_PAIRS = 400


def made_up_scores(*, heads: bool = True) -> list[Score]:
    """Chosen and rejected alternate; a pair is wrong in one of five, and its heads then disagree most of the time."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(NUM_PAIRS):
        is_wrong = rng.random() < 0.2
        spread = rng.normal(2.0 if is_wrong else 0.5, 0.4)
        for reward, deviation in ((-1.0 if is_wrong else 1.0, spread), (0.0, 0.0)):
            surprise = float(rng.exponential())
            scores.append(
                Score(
                    reward + float(rng.normal(0, 0.1)),
                    reward_std_epistemic=0.1,
                    ood=OodReport(0.5, False, "single", surprise, "oe", 0.01, "id", True, score=surprise),
                    head_deviations=(deviation, 0.0, -deviation) if heads else None,
                )
            )
    return scores


PAIRS = np.arange(2 * NUM_PAIRS).reshape(-1, 2)
PROMPTS = np.repeat(np.arange(NUM_PAIRS), 2)


def test_a_figure_that_knows_is_told_from_one_that_does_not() -> None:
    """The disagreement that follows the errors has an AUROC near 1 and is better than distance by many errors."""
    found = measure_pairs(made_up_scores(), PAIRS, PROMPTS)

    assert found is not None
    assert found.error == pytest.approx(0.2, abs=0.05)
    main, distance = found.figures[MAIN_FIGURE], found.figures["surprise"]
    assert main.auroc > 0.95
    assert distance.auroc == pytest.approx(0.5, abs=0.1)
    assert distance.behind is not None
    assert distance.behind == pytest.approx(main.auroc - distance.auroc)
    assert distance.behind_error is not None
    assert distance.behind > 5 * distance.behind_error
    assert main.retention_area is not None
    assert max(main.retained_errors) < 0.05 < min(distance.retained_errors)
    assert found.ideal_area < main.retention_area < 0.5 * found.random_area


def test_without_heads_the_other_figures_are_measured() -> None:
    """A calibration without heads has no disagreement to measure, and nothing is compared with it."""
    found = measure_pairs(made_up_scores(heads=False), PAIRS, PROMPTS)

    assert found is not None
    assert set(found.figures) == {"small margin", "Laplace", "surprise", "Mahalanobis distance"}
    assert {one.behind for one in found.figures.values()} == {None}


def test_too_few_errors_are_not_measured() -> None:
    """Pairs that are nearly all right say nothing about what predicts the wrong ones."""
    assert measure_pairs([Score(1.0), Score(0.0)] * 50, np.arange(100).reshape(-1, 2), np.arange(100)) is None
    assert measure_pairs([Score(1.0)], np.empty((0, 2), np.int64), np.arange(1)) is None


def test_retention_by_hand() -> None:
    """Of four pairs with one wrong, giving it up first leaves it in the last step alone; keeping it longest, in all."""
    wrong = np.array([True, False, False, False])

    assert retention_area(wrong, np.array([9.0, 1.0, 2.0, 3.0])) == pytest.approx(1 / 16)
    assert retention_area(wrong, np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx(4 / 16)
    assert RETAINED == (0.75, 0.5, 0.25)
    assert retained_errors(wrong, np.array([9.0, 1.0, 2.0, 3.0])) == (0.0, 0.0, 0.0)
    assert retained_errors(wrong, np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx((1 / 3, 1 / 2, 1.0))
