"""The figures of a calibration against other definitions of them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from export.calibration.measure import detection


def test_the_area_is_that_of_the_roc_curve() -> None:
    """With ties within and between the classes it equals scikit-learn's, and 1, 0 and one half at the extremes."""
    rng = np.random.default_rng(0)
    clean, hacked = rng.integers(0, 9, 200).astype(np.float64), rng.integers(3, 12, 35).astype(np.float64)

    found = detection(clean, hacked)

    labels = np.repeat([0, 1], [len(clean), len(hacked)])
    assert found.auroc == pytest.approx(roc_auc_score(labels, np.concatenate([clean, hacked])), abs=1e-12)
    assert [detection(clean, other).auroc for other in (clean + 99, clean - 99, clean)] == [1.0, 0.0, 0.5]
