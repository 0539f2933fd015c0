"""Compares a graph's rewards with those of plain transformers, and decides whether the difference is acceptable.

Pure: it takes two lists of rewards and returns a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.checkpoints.bundle import ExportParity, Precision
from service.diagnostics.correlation import spearman_correlation
from service.errors import ParityError


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits that a report must be within."""

    max_difference: float | None = None
    """Largest absolute difference, multiplied by the largest magnitude of the reference where that exceeds 1; None: no
    limit."""

    min_spearman: float | None = None
    """Smallest rank correlation; None: no limit."""


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(max_difference=1e-4),
    "fp16": Bounds(min_spearman=0.999),
    "int8": Bounds(min_spearman=0.98),
}
"""The limits by precision. Rounding changes fp32 in the sixth digit; for lower precisions the order of rewards counts.

For int8 the built-in texts are the hard case, because of their scripts, their lengths and answers with close rewards:
the demo model has a rank correlation of 0.984 there and of 0.995 on human-written texts. A faulty quantization has 0.96
or less."""


def compare_rewards(rewards: Sequence[float], reference: Sequence[float], text_source: str) -> ExportParity:
    """Compare rewards with reference rewards of the same texts.

    Spearman's rank correlation is Pearson's correlation of the ranks, where ties share their mean rank. It is 1 where
    all reference rewards are equal, 0 where only the graph's rewards are, and NaN where one of these is not finite.

    Args:
        rewards: rewards of the graph, at least two.
        reference: rewards of plain transformers, in the same order.
        text_source: the origin of the texts, for the report.
    """
    graph, plain = np.asarray(rewards, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    differences = np.abs(graph - plain)
    return ExportParity(
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        spearman=_spearman(graph, plain),
        pair_agreement=_pair_agreement(graph, plain),
        num_texts=len(plain),
        text_source=text_source,
    )


def validate_parity(parity: ExportParity, bounds: Bounds, reference: Sequence[float]) -> None:
    """Check that a report is within the bounds; NaN is outside of every bound.

    Args:
        parity: the report.
        bounds: the limits of the precision, or those given by the user.
        reference: the rewards of plain transformers, whose magnitude scales ``max_difference``.

    Raises:
        ParityError: it is not; names the value and the bound.
    """
    magnitude = max(1.0, *(abs(reward) for reward in reference))
    limit = None if bounds.max_difference is None else bounds.max_difference * magnitude
    if limit is not None and not parity.max_difference <= limit:
        raise ParityError(
            f"Nothing was written: the graph's rewards differ by up to {parity.max_difference:.3g} from plain "
            f"transformers, more than {limit:.3g}, on {parity.num_texts} texts ({parity.text_source})."
        )
    if bounds.min_spearman is not None and not parity.spearman >= bounds.min_spearman:
        raise ParityError(
            f"Nothing was written: the rank correlation with plain transformers is {parity.spearman:.5f} on "
            f"{parity.num_texts} texts ({parity.text_source}), below {bounds.min_spearman}; choose a higher precision, "
            "or set --min-spearman if this order is good enough."
        )


def _spearman(graph: np.ndarray, plain: np.ndarray) -> float:
    if not np.isfinite(graph).all():
        return float("nan")
    if np.ptp(plain) == 0:
        return 1.0
    return 0.0 if np.ptp(graph) == 0 else spearman_correlation(graph, plain)


def _pair_agreement(graph: np.ndarray, plain: np.ndarray) -> float:
    first, second = np.triu_indices(len(plain), k=1)
    expected = np.sign(plain[first] - plain[second])
    differs = expected != 0
    if not differs.any():
        return 1.0
    return float((np.sign(graph[first] - graph[second]) == expected)[differs].mean())
