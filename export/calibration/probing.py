"""The probe of a calibration: what the reward pays for, on completions that no detector was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.calibration.data import CleanItem, split
from export.calibration.scoring import score_items
from service.assembly import ServedModel
from service.console import Advance
from service.edits.probe import Probe, ProbePlan, effects_of, plan_probe


def plan_of(items: Sequence[CleanItem], num_completions: int, seed: int) -> ProbePlan:
    """Choose completions of the part ``calibrate`` and edit them."""
    return plan_probe([item.exchange for item in split(items)["calibrate"]], num_completions, seed)


def probe_reward(served: ServedModel, plan: ProbePlan, advance: Advance, cache: Path | None = None) -> Probe | None:
    """Score a plan and return what the reward pays for; None for a plan without completions.

    An edited completion that the service refuses (it is too long) is left out, with its edit only.

    Raises:
        CalibrationError: see `score_items`.
    """
    if not plan.originals:
        return None
    exchanges = plan.exchanges
    scored, indices = score_items(served, exchanges, advance, cache)
    rewards = np.full(len(exchanges), np.nan)
    rewards[indices] = scored.rewards
    return effects_of(plan, rewards)
