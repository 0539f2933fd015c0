"""The fit of the reward that length alone predicts: what remains within prompts and over all items of other prompts."""

from __future__ import annotations

import numpy as np
import pytest

from export.calibration.length_fit import fit_length_curve
from export.calibration.measure import length_correlations
from service.diagnostics.calibration_facts import LengthCorrelations


def made_up_items(
    within: float, between: float, *, seed: int, num_prompts: int = 1500, per_prompt: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log lengths, rewards and prompts; rewards rise with length by one slope within and another between prompts."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(num_prompts), per_prompt)
    typical = rng.normal(4.0, 0.7, num_prompts)[prompts]
    own = rng.normal(0.0, 0.7, len(prompts))
    rewards = within * own + between * typical + rng.normal(0.0, 1.0, len(prompts))
    return typical + own, rewards, prompts


def remaining(within: float, between: float, per_prompt: int = 2) -> LengthCorrelations:
    """What the curve of some prompts leaves on others."""
    curve = fit_length_curve(*made_up_items(within, between, seed=0, per_prompt=per_prompt))
    lengths, rewards, prompts = made_up_items(within, between, seed=1, per_prompt=per_prompt)
    return length_correlations(rewards - np.interp(lengths, curve.x, curve.y), lengths, prompts)


def test_one_slope_is_removed_everywhere() -> None:
    """Where length acts alike within and between prompts, hardly any correlation remains in either."""
    left = remaining(0.6, 0.6)

    assert abs(left.pooled) < 0.08
    assert abs(left.within) < 0.08


def test_prompts_with_longer_and_better_answers_do_not_overcorrect() -> None:
    """Where prompts differ more than their completions, what remains over all items has the sign of the bias."""
    left = remaining(0.5, 0.9)

    assert abs(left.within) < 0.07
    assert left.pooled > -0.02


def test_items_without_siblings_have_a_curve() -> None:
    """With one completion for each prompt there are no differences within prompts, and the pooled ones are removed."""
    left = remaining(0.6, 0.6, per_prompt=1)

    assert left.pooled == pytest.approx(0.0, abs=0.07)
    assert np.isnan(left.within)
