"""Answer bodies of the service's own wire format, version 1, from outcomes of the scorer.

Pure: it depends neither on a web framework nor on an engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from reward_client.options import DiagnosticsLevel, TemplateChoice

from service.diagnostics.item_state import Outcome
from service.diagnostics.resampled_heads import lower_reward
from service.errors import HttpError, NonFiniteReward
from service.protocols.problem import item_error
from service.records import Item, ModelIdentity, Score, ScoreRequest, Timings, Usage

BASIC_DIAGNOSTICS = ("reward_z", "reward_percentile", "reward_length_adjusted", "length", "style")

FULL_DIAGNOSTICS = ("reward_std_epistemic", "reward_disagreement", "ood")
"""Members of a result at level ``basic``, and those that ``full`` adds."""


def render_scores(
    request: ScoreRequest,
    outcomes: Sequence[Outcome],
    model: ModelIdentity,
    template: TemplateChoice,
    usage: Usage,
    timings: Timings,
    outputs: Sequence[str] = ("reward",),
) -> bytes:
    """Render the answer of ``POST /v1/score``: one result per item, in input order.

    Rewards have every digit of their float32 value. An item without a score has an ``error`` instead. Items of a model
    with several ``outputs`` have each of them by its name in ``rewards``, and ``reward`` where their weights are known.

    Raises:
        NonFiniteReward: a Score is NaN or infinite, which the scorer should have turned into an item error.
    """
    return msgspec.json.encode(
        _envelope(model, template, usage, timings) | {"results": _results(request, outcomes, outputs)}
    )


def render_comparison(
    request: ScoreRequest,
    outcomes: Sequence[Outcome],
    model: ModelIdentity,
    template: TemplateChoice,
    usage: Usage,
    timings: Timings,
    outputs: Sequence[str] = ("reward",),
) -> bytes:
    """Render the answer of ``POST /v1/compare``: results as of ``/v1/score``, and pairwise win probabilities.

    Raises:
        HttpError: the error of the first completion without a reward, since a comparison needs all of them.
    """
    for outcome in outcomes:
        if isinstance(outcome, HttpError):
            raise outcome
    results = _results(request, outcomes, outputs)
    rewards = [result["reward"] for result in results]
    answer = {
        "rewards": rewards,
        "probabilities": win_probabilities(rewards),
        "best": max(range(len(rewards)), key=rewards.__getitem__),
        "results": results,
    }
    return msgspec.json.encode(_envelope(model, template, usage, timings) | answer)


def win_probabilities(rewards: Sequence[float]) -> list[list[float]]:
    """Probability that completion ``i`` (row) is preferred to completion ``j`` (column), 0.5 on the diagonal.

    Bradley and Terry 1952 with strengths ``exp(reward)``: ``sigma(r_i - r_j)``. The exponential is only taken of
    non-positive numbers, so no difference of rewards overflows, and entries ``i, j`` and ``j, i`` sum to one.

    Args:
        rewards: [completion].

    Returns:
        [completion][completion].
    """
    table = [[0.5] * len(rewards) for _ in rewards]
    for i, row_reward in enumerate(rewards):
        for j in range(i + 1, len(rewards)):
            margin = row_reward - rewards[j]
            odds_of_loser = math.exp(-abs(margin))
            winner, loser = 1.0 / (1.0 + odds_of_loser), odds_of_loser / (1.0 + odds_of_loser)
            table[i][j], table[j][i] = (winner, loser) if margin >= 0 else (loser, winner)
    return table


def _envelope(model: ModelIdentity, template: TemplateChoice, usage: Usage, timings: Timings) -> dict[str, Any]:
    return {
        "model": {"name": model.name, "version": model.version},
        "template": template,
        "usage": usage,
        "timings_ms": {stage: round(seconds * 1000, 3) for stage, seconds in timings.by_stage.items()},
    }


def _results(request: ScoreRequest, outcomes: Sequence[Outcome], outputs: Sequence[str]) -> list[dict[str, Any]]:
    return [
        _result(index, item, outcome, request, outputs)
        for index, (item, outcome) in enumerate(zip(request.items, outcomes, strict=True))
    ]


def _result(index: int, item: Item, outcome: Outcome, request: ScoreRequest, outputs: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index}
    if item.id is not None:
        result["id"] = item.id
    if item.digest is not None:
        result["digest"] = item.digest
    if isinstance(outcome, HttpError):
        return result | {"error": item_error(outcome)}
    if outcome.reward is not None:
        if not math.isfinite(outcome.reward):
            # The encoder would write null, and null is not a reward.
            raise NonFiniteReward(f"Item {index} has no finite reward")
        result["reward"] = outcome.reward
    if outcome.outputs:
        result["rewards"] = dict(zip(outputs, outcome.outputs, strict=True))
    if outcome.reward_std is not None:
        result |= {"reward_members": outcome.outputs, "reward_std": outcome.reward_std}
    if outcome.step_rewards:
        result["step_rewards"] = outcome.step_rewards
    if outcome.step_outputs and len(outputs) > 1:
        result["step_outputs"] = [dict(zip(outputs, values, strict=True)) for values in outcome.step_outputs]
    if request.pessimism is not None:
        result["reward_lower"] = lower_reward(outcome.reward, outcome.reward_disagreement, request.pessimism)
    return result | diagnostics_of(outcome, request.diagnostics)


def diagnostics_of(score: Score, level: DiagnosticsLevel) -> dict[str, Any]:
    """Return the diagnostics of an item as members of its result, JSON-encodable.

    Members that the level does not include are absent; members that are not known are null, with the reason in
    ``calibration``. The ``group`` block is absent if the prompt has one completion only.
    """
    if level == "none":
        return {}
    members: dict[str, Any] = {name: getattr(score, name) for name in BASIC_DIAGNOSTICS}
    if level == "full":
        members |= {name: getattr(score, name) for name in FULL_DIAGNOSTICS}
    if score.group is not None:
        members["group"] = score.group
    if score.gap is not None:
        members["calibration"] = score.gap
    return members
