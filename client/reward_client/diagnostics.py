"""The diagnostics of an item as records; what they mean is in the service's docs/diagnostics.md.

Fields have the names of the response. None: not requested, or unknown; no value is a guess. Members that these records
do not have are in ``ScoredItem.diagnostics``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LengthBlock:
    """Lengths of an item in tokens and characters."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_chars: int | None = None
    scored_tokens: int | None = None
    """Tokens that the model read."""
    truncated: bool | None = None
    """Whether that is less than was sent."""
    length_z: float | None = None
    length_percentile: float | None = None
    """Rank of the completion's length in the calibration, 0 to 1."""
    last_token_id: int | None = None
    """The last token that the model read."""
    double_bos: bool | None = None
    """Whether what the model read begins with two BOS tokens."""
    special_tokens: int | None = None
    """Special tokens that are written in the completion's text."""


@dataclass(frozen=True, slots=True)
class StyleBlock:
    """Counts and fractions of the whole completion."""

    headers: int | None = None
    list_items: int | None = None
    bold: int | None = None
    emoji: int | None = None
    hedges: int | None = None
    flattery: int | None = None
    words: int | None = None
    repeat4: float | None = None
    zlib_ratio: float | None = None
    non_ascii: float | None = None
    prompt_overlap: float | None = None
    style_p: float | None = None
    """Conformal p-value of the style as a whole."""


@dataclass(frozen=True, slots=True)
class LayerPValues:
    """Conformal p-values of the pooled states."""

    mid: float | None = None
    last: float | None = None


@dataclass(frozen=True, slots=True)
class OodBlock:
    """How typical an item is of the calibration (out-of-distribution detection)."""

    p_value: float | None = None
    """Fraction of calibration items that are at least as unusual as this one."""
    flag: bool | None = None
    """Whether ``p_value`` is at most the configured rate of false alarms."""
    mode: str | None = None
    """``group``: the other completions of the item's prompt were used too; ``single``: the item alone."""
    surprise: float | None = None
    """The largest -ln p of the components; ``p_value`` ranks it."""
    reason: str | None = None
    """The component with the largest -ln p."""
    resolution: float | None = None
    """The lowest p-value that the size of the calibration allows."""
    calibration_id: str | None = None
    valid_for_tail: bool | None = None
    """Whether the model read the whole item; if not, its small p-values are not reliable."""
    p_text: float | None = None
    p_feature: float | None = None
    p_layers: LayerPValues | None = None
    p_oe: float | None = None
    p_group: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class GroupBlock:
    """An item compared with the other completions of its prompt in the same request."""

    n: int | None = None
    """Completions with a reward, this one included."""
    length_corr: float | None = None
    """Pearson correlation of reward and log length in the group."""
    reward_centered: float | None = None
    """The reward minus the mean of the group."""
    disagreement: float | None = None
    """Standard deviation of ``reward_centered`` over the resampled heads."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Everything that is known about an item besides its reward."""

    reward_z: float | None = None
    """The reward in standard deviations from the calibration's mean."""
    reward_percentile: float | None = None
    """Rank of the reward in the calibration, 0 to 1."""
    reward_length_adjusted: float | None = None
    """The reward without what the calibration's length curve explains."""
    reward_std_epistemic: float | None = None
    """Standard deviation of the reward due to limited training data."""
    reward_disagreement: float | None = None
    """Standard deviation of the reward over heads that were fitted to resampled preference pairs."""
    reward_lower: float | None = None
    """With ``pessimism`` k: the reward less k times ``reward_disagreement``."""
    length: LengthBlock | None = None
    style: StyleBlock | None = None
    ood: OodBlock | None = None
    group: GroupBlock | None = None
    calibration: str | None = None
    """Why calibrated values are None: ``missing`` or ``inapplicable``; None where they are known."""
