"""Rewards by the weights of a request, in place of the service's own.

Pure. The head's outputs do not depend on weights, so sequences are computed and shared as without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from service.checkpoints.reward_description import WeightedSum
from service.diagnostics.item_state import Outcome
from service.errors import NonFiniteReward
from service.records import Score
from service.reward_rule import RewardRule


def with_weights(outcomes: Sequence[Outcome], rule: RewardRule, weights: Mapping[str, float]) -> list[Outcome]:
    """Return the outcomes of a request with the rewards that its weights give.

    Weights that equal the service's own change nothing. A reward that is not finite becomes NonFiniteReward.

    Args:
        outcomes: of the engine; errors are returned unchanged.
        rule: of the served model.
        weights: by the name of the output; an output without one counts zero.
    """
    if isinstance(rule.combine, WeightedSum) and _nonzero(rule.combine.weights) == _nonzero(weights):
        return list(outcomes)
    return [_weighted(outcome, rule, weights) if isinstance(outcome, Score) else outcome for outcome in outcomes]


def _weighted(score: Score, rule: RewardRule, weights: Mapping[str, float]) -> Outcome:
    steps = [_sum(outputs, rule, weights) for outputs in score.step_outputs]
    reward = rule.aggregate(steps) if steps else _sum(score.outputs, rule, weights)
    if not all(map(math.isfinite, (*steps, reward))):
        return NonFiniteReward("The weighted sum of the model's outputs is not finite.")
    return replace(score, reward=reward, step_rewards=tuple(steps), own_weights=True)


def _sum(outputs: Sequence[float], rule: RewardRule, weights: Mapping[str, float]) -> float:
    reward = rule.reward_of(outputs, weights)
    return math.nan if reward is None else reward


def _nonzero(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight}
