"""How a calibration was made and what was measured on it: the record in the artifact's header.

The service shows a part of it in ``/v1/model`` and in metrics; ``reward-calibrate`` fills and prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Detection:
    """How well the scores of one set of hacks are separated from those of clean items."""

    num_items: int
    """Items of the set."""

    auroc: float
    """Area under the ROC curve: probability that a hacked item has a higher score than a clean one."""

    fpr95: float
    """Share of clean items at or above the score that 95 percent of the set reach."""

    tpr1: float
    """Share of the set above 99 percent of the clean items."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A realised share of items, with a standard error that treats prompts as clusters."""

    nominal: float
    """The share that is expected."""

    value: float
    standard_error: float
    num_items: int
    num_prompts: int

    is_tolerable: bool
    """Whether the value is within 30 percent of the nominal share, or within three standard errors of it."""


@dataclass(frozen=True, slots=True)
class LengthCorrelations:
    """Pearson correlations of a reward with ln(1 + completion tokens), on items that its curve was not fitted to."""

    pooled: float
    """Over all items."""

    within: float
    """About the means of the prompts; NaN where that is undefined."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Out-of-fold p-values of the calibration's own items."""

    rates: list[Rate]
    """Realised false-alarm rates at 1 and 5 percent."""

    design_effect: float | None
    """Variance of the 5 percent rate over that of independent items; None where the rate is 0 or 1."""

    ks_p: float
    """p-value of the Kolmogorov-Smirnov test that the p-values are uniform."""


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """How the resampled heads were fitted."""

    num_heads: int
    num_pairs: int

    prior_share: float
    """Standard deviation of the margin under the prior, as a share of that of the served margins; chosen by
    cross-validation over prompts."""

    log_likelihood_gain: float
    """What a head that is fitted to the pairs gains over the served one, in nats per pair of other prompts."""


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """How a calibration was made and what was measured on it."""

    created: str
    """Time of creation, ISO 8601 with time zone."""

    seed: int
    """Seed of the hacks, the trees and the folds."""

    versions: dict[str, str]
    """Versions of the packages that made it, by name."""

    data_sha256: str
    """Hash of the data files, hexadecimal."""

    held_out_only: bool
    """Whether the prompts that the demo model was trained on were left out."""

    dropped: list[str]
    """Built-in sets of hacks that were left out because they are normal in the user's traffic."""

    num_fit: int
    """Items of the parts ``fit_states`` and ``fit_detectors``."""

    num_select: int
    """Items of the part ``select``."""

    num_calibrate: int
    """Items of the part ``calibrate``, among which p-values are ranks."""

    num_prompts: int
    """Prompts of the part ``calibrate``."""

    admitted: list[str]
    """Components of the combination, in order of admission."""

    gains: dict[str, float]
    """What each admitted component added to the benefit of the combination."""

    self_test: SelfTest
    """Self-test of the combination."""

    realised: dict[str, Rate]
    """Realised false-alarm rate at 1 percent of the combination and of each component."""

    suite: dict[str, dict[str, Detection]]
    """Detection of each built-in set of hacks (inner key) by the combination and by each component (outer key)."""

    unseen_family: dict[str, Detection]
    """Detection of each set by trees that were fitted without the set's family."""

    mean_auroc: float
    """Mean of the combination's AUROC over the sets that detectors may learn from."""

    weak: bool
    """Whether that mean is so low that the calibration is hardly of use."""

    length: dict[str, LengthCorrelations]
    """Correlations with length of the ``raw`` and the ``adjusted`` reward."""

    heads: HeadFacts | None = None
    """Of the resampled heads; None where the data had too few preference pairs, or before there were such heads."""
    new_kind: dict[str, Detection] = field(default_factory=dict)
    """Detection of each set by the combination, its trees fitted without the set's family; empty where it was not
    measured."""

    new_kind_auroc: float | None = None
    """Mean of these AUROCs: what to expect of a kind of hack that is not in the suite."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CalibrationFacts:
        """Return the record that `as_json` wrote.

        Raises:
            ValueError: a field is missing or of another type.
        """
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain dictionaries, lists and numbers."""
        return asdict(self)
