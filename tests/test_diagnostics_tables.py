"""The tables of docs/diagnostics.md can be made from the figures of ``reward-calibrate --json``."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DETECTION = {"num_items": 25, "auroc": 0.987, "fpr95": 0.1, "tpr1": 0.5}
CATEGORY = {
    "num_items": 40,
    "auroc": 0.912,
    "flagged": 0.25,
    "reward_z": -0.5,
    "sibling_auroc": None,
    "sibling_flagged": None,
}
UNCERTAINTY = {"auroc": 0.461, "standard_error": 0.018, "behind": -0.046, "behind_error": 0.017, "retention_area": 0.23}
FIGURES: dict[str, Any] = {
    "calibration": {
        "suite": {"combined": {"padding": DETECTION}},
        "new_kind": {"padding": DETECTION | {"auroc": 0.654}},
    },
    "probe": {
        "num_completions": 32,
        "effects": [
            {
                "description": "two bold words",
                "effect": 0.1,
                "low": 0.05,
                "high": 0.15,
                "effect_sd": 0.2,
                "share_higher": 0.75,
            }
        ],
    },
    "test": {
        "rates": [{"nominal": 0.01, "value": 0.0094, "standard_error": 0.0026, "num_items": 1920, "num_prompts": 880}],
        "length": {name: {"pooled": 0.46, "within": 0.35} for name in ("raw", "adjusted")},
        "pairs": {
            "num_pairs": 880,
            "error": 0.44,
            "random_area": 0.22,
            "ideal_area": 0.097,
            "figures": {
                "disagreement": UNCERTAINTY | {"behind": 0.0, "behind_error": 0.0},
                "Laplace": UNCERTAINTY | {"auroc": 0.507},
            },
        },
        "categories": {
            "zalgo": CATEGORY | {"is_ood": True, "sibling_auroc": 0.99, "sibling_flagged": 1.0},
            "truncated": CATEGORY | {"is_ood": False},
        },
    },
}


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("diagnostics_tables", ROOT / "docs" / "diagnostics_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_a_place_for_every_table(tables: ModuleType) -> None:
    """Each table is made from its figures and stands in the page once; the text around them stays."""
    page = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")

    found = tables.written(page, FIGURES)

    assert sorted(re.findall(r"<!-- figures: ([\w-]+) -->", page)) == sorted(tables.TABLES)
    for cell in (
        "0.94 % ± 0.26 %",
        "+0.460, +0.350",
        "| zalgo | -0.50 | 0.912 |",
        "0.654",
        "| 0.461 ± 0.018 | | 0.2300 |",
        "| 0.507 ± 0.018 | -0.046 ± 0.017 | 0.2300 |",
        "(880 pairs, of which 44.0 % are wrong)",
        "+0.100 (+0.050 to +0.150)",
    ):
        assert cell in found
    assert tables.written(found, FIGURES) == found
    outside = re.compile(r"<!-- figures.*?end of figures -->", re.DOTALL)
    assert outside.sub("", found) == outside.sub("", page)
