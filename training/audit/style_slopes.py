"""What the model pays for style: slopes of the reward on length, markdown, emoji, hedges and flattery.

A regression among the completions of one prompt (style control as of Chatbot Arena and of length-controlled AlpacaEval,
Dubois et al. 2024, with the reward in place of the vote). What counts as style is the service's own definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from statsmodels.regression.linear_model import OLS

from service.diagnostics.lexicon import StyleMarkers, count_style_markers
from training.audit.intervals import Interval
from training.audit.length_bias import centre
from training.audit.scored_pairs import Completions, FloatArray

TELLS = ("headers", "list_items", "bold", "emoji", "hedges", "flattery")
MIN_TEXTS = 20
"""A feature that fewer completions have is not fitted: its slope would be that of a few texts."""


@dataclass(frozen=True, slots=True)
class StyleSlope:
    """What one feature is worth to the model, the other features held.

    ``num_texts``: completions that have it. ``per_unit``: units of the reward per unit of ln(1 + count). ``per_sd``:
    standard deviations of the reward per standard deviation of the feature, so that features compare.
    """

    feature: str
    num_texts: int
    per_unit: float
    per_sd: Interval


@dataclass(frozen=True, slots=True)
class Style:
    """What length and style are worth.

    ``r_squared``: share of the variance of rewards, within prompts, that they explain together. ``too_rare``: features
    that were not fitted.
    """

    slopes: Sequence[StyleSlope]
    r_squared: float
    too_rare: Sequence[str]


def measure_style(completions: Completions) -> Style:
    """Fit the rewards, within prompts, by length and style; standard errors are clustered by prompt."""
    columns = _features(completions)
    counts = {name: int(np.count_nonzero(values)) for name, values in columns.items()}
    inner = {name: centre(values, completions.prompts) for name, values in columns.items()}
    fitted = [name for name in columns if counts[name] >= MIN_TEXTS and inner[name].std() > 0]
    too_rare = [name for name in columns if name not in fitted]
    rewards = centre(completions.rewards, completions.prompts)
    if not fitted or rewards.std() == 0:
        return Style([], 0.0, too_rare)
    deviations = np.array([inner[name].std() for name in fitted])
    design = np.stack([inner[name] for name in fitted], axis=1) / deviations
    fit = OLS(rewards / rewards.std(), design).fit(cov_type="cluster", cov_kwds={"groups": completions.prompts})
    bounds = fit.conf_int()
    slopes = [
        StyleSlope(
            feature=name,
            num_texts=counts[name],
            per_unit=float(slope * rewards.std() / deviation),
            per_sd=Interval(float(slope), float(low), float(high)),
        )
        for name, slope, (low, high), deviation in zip(fitted, fit.params, bounds, deviations, strict=True)
    ]
    return Style(slopes, float(fit.rsquared), too_rare)


def tells_of(texts: Sequence[str]) -> list[StyleMarkers]:
    """Count the tells of each text, as the service counts them."""
    return [count_style_markers(text) for text in texts]


def _features(completions: Completions) -> dict[str, FloatArray]:
    tells = tells_of(completions.texts)
    counts = {name: np.log1p([float(getattr(told, name)) for told in tells]) for name in TELLS}
    return {"length": completions.log_lengths, **counts}
