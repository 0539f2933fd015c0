"""Says how well a graph's rewards agree with those of plain transformers, and whether well enough to be served.

Pure: two rows of numbers in, a report out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from service.checkpoints.bundle import ExportParity, Precision
from service.errors import ParityError


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a report has to meet. ``max_difference`` grows with rewards beyond one; None: no bound."""

    max_difference: float | None = None
    min_spearman: float | None = None


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(max_difference=1e-4),
    "fp16": Bounds(min_spearman=0.999),
    "int8": Bounds(min_spearman=0.98),
}
"""Rounding moves fp32 in the sixth digit; what fewer bits move is judged by the order of the rewards.

For int8 the built-in texts are the hard case, with their scripts, lengths and answers that lie close together: the demo
model keeps 0.984 there where it keeps 0.995 on people's texts. A quantization that went wrong keeps 0.96 and less."""


def compare_rewards(rewards: Sequence[float], reference: Sequence[float], items: str) -> ExportParity:
    """Compare rewards with their reference, item by item; at least two items.

    Spearman is Pearson's correlation of the ranks, ties sharing their mean rank; 1 where the reference has no order.
    ``items`` names the source of the texts.
    """
    ours, plain = np.asarray(rewards, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    gaps = np.abs(ours - plain)
    return ExportParity(
        max_difference=float(gaps.max()),
        mean_difference=float(gaps.mean()),
        spearman=_spearman(ours, plain),
        pair_agreement=_pair_agreement(ours, plain),
        num_items=len(plain),
        items=items,
    )


def refuse_disagreement(parity: ExportParity, bounds: Bounds, reference: Sequence[float]) -> None:
    """Return where the report meets the bounds; NaN meets none.

    Raises:
        ParityError: it does not; names the figure and the bound.
    """
    magnitude = max(1.0, *(abs(reward) for reward in reference))
    limit = None if bounds.max_difference is None else bounds.max_difference * magnitude
    if limit is not None and not parity.max_difference <= limit:
        raise ParityError(
            f"Nothing was written: the graph's rewards differ by up to {parity.max_difference:.3g} from plain "
            f"transformers, more than {limit:.3g}, on {parity.num_items} items ({parity.items})."
        )
    if bounds.min_spearman is not None and not parity.spearman >= bounds.min_spearman:
        raise ParityError(
            f"Nothing was written: the graph orders {parity.num_items} items ({parity.items}) with a rank correlation "
            f"of {parity.spearman:.5f} to plain transformers, below {bounds.min_spearman}; take a higher precision, or "
            "set --min-spearman if these ranks will do."
        )


def _spearman(ours: np.ndarray, plain: np.ndarray) -> float:
    if not np.isfinite(ours).all():
        return float("nan")
    a, b = rankdata(ours), rankdata(plain)
    if b.std() == 0:
        return 1.0
    return 0.0 if a.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def _pair_agreement(ours: np.ndarray, plain: np.ndarray) -> float:
    first, second = np.triu_indices(len(plain), k=1)
    wanted = np.sign(plain[first] - plain[second])
    differs = wanted != 0
    if not differs.any():
        return 1.0
    return float((np.sign(ours[first] - ours[second]) == wanted)[differs].mean())
