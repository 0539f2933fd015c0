"""Regression of the reward on length and style: markdown, emoji, hedges and flattery.

The regression is within prompts (style control as in Chatbot Arena and in length-controlled AlpacaEval, Dubois et al.
2024, with the reward in place of the vote). Style features are counted by the service's own code.
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

STYLE_FEATURES = ("headers", "list_items", "bold", "emoji", "hedges", "flattery")
MIN_TEXTS = 20
"""A feature that fewer completions have is not fitted: its slope would depend on a few texts."""


@dataclass(frozen=True, slots=True)
class StyleSlope:
    """The slope of the reward on one feature, with the other features held constant."""

    feature: str

    num_texts: int
    """Completions that have the feature."""

    per_unit: float
    """Units of the reward per unit of ln(1 + count)."""

    per_sd: Interval
    """Standard deviations of the reward per standard deviation of the feature, which is comparable between features."""


@dataclass(frozen=True, slots=True)
class Style:
    """The regression of the reward on length and style."""

    slopes: Sequence[StyleSlope]

    r_squared: float
    """Share of the variance of rewards within prompts that the features explain together."""

    too_rare: Sequence[str]
    """Features that were not fitted because too few completions have them."""


def measure_style(completions: Completions) -> Style:
    """Regress the rewards within prompts on length and style, with standard errors clustered by prompt."""
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


def style_markers_of(texts: Sequence[str]) -> list[StyleMarkers]:
    """Count the style markers of each text as the service does."""
    return [count_style_markers(text) for text in texts]


def _features(completions: Completions) -> dict[str, FloatArray]:
    markers = style_markers_of(completions.texts)
    counts = {name: np.log1p([float(getattr(each, name)) for each in markers]) for name in STYLE_FEATURES}
    return {"length": completions.log_lengths, **counts}
