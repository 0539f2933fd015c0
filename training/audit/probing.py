"""The probe of an audit: which edits of chosen completions the reward pays for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.console import Advance
from service.edits.probe import Probe, ProbePlan, effects_of, plan_probe
from service.records import Exchange
from training.audit.scoring import ScoredCompletion, Scorer
from training.preferences import PreferencePair

SEED = 0


def plan_of(pairs: Sequence[PreferencePair], num_completions: int) -> ProbePlan:
    """Choose chosen completions of as many prompts as possible, and edit them."""
    return plan_probe([Exchange(pair.prompt, pair.chosen, pair.tools) for pair in pairs], num_completions, SEED)


def probe_reward(plan: ProbePlan, scorer: Scorer, advance: Advance) -> Probe:
    """Score a plan and return what the reward pays for; a text without a reward is left out, with its edit only."""
    outcomes = scorer.score(plan.exchanges, advance)
    rewards = [outcome.reward if isinstance(outcome, ScoredCompletion) else np.nan for outcome in outcomes]
    return effects_of(plan, np.array(rewards, np.float64))
