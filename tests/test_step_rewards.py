"""How the outputs at steps become step rewards and the reward of a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.reward_description import (
    DESCRIPTION_FILE,
    ClassifierHead,
    Probability,
    RewardDescription,
    StepRule,
    write_description,
)
from service.engines.oracle import OracleEngine, OracleFaults, oracle_reward
from service.errors import CheckpointError, NonFiniteReward
from service.pipeline import Pipeline
from service.records import Score, StepAggregate, TokenSequence
from service.reward_rule import RewardRule
from service.settings import ModelSettings

STEPS = [0.5, 0.25, 0.75]


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("last", 0.75), ("min", 0.25), ("mean", 0.5), ("product", 0.09375)]
)
def test_aggregates(aggregate: StepAggregate, expected: float) -> None:
    """Each aggregate is what its name says, and one that is not finite stays so in any order."""
    rule = RewardRule(step_aggregate=aggregate)

    assert rule.aggregate(STEPS) == expected
    assert rule.aggregate([0.5]) == 0.5
    if aggregate != "last":
        assert math.isnan(rule.aggregate([math.nan, 1.0]))
        assert math.isnan(rule.aggregate([1.0, math.nan]))


def test_probabilities() -> None:
    """The softmax of several logits and the logistic function of one, without overflow."""
    two = RewardRule(("bad", "good"), Probability("good"))
    one = RewardRule(("reward",), Probability("reward"))

    assert two.reward_of([1.0, 3.0]) == pytest.approx(1 / (1 + math.exp(-2)))
    assert one.reward_of([2.0]) == pytest.approx(1 / (1 + math.exp(-2)))
    assert two.reward_of([-1e4, 1e4]) == 1.0
    assert one.reward_of([-1e4]) == 0.0


def test_the_aggregate_of_the_settings_comes_first() -> None:
    """Then that of the description; a model that was trained on whole texts has the last step's reward."""
    described = RewardDescription(ClassifierHead(), steps=StepRule("x", aggregate="product"))

    assert RewardRule.of(described, "mean").step_aggregate == "mean"
    assert RewardRule.of(described).step_aggregate == "product"
    assert RewardRule.of(RewardDescription(ClassifierHead())).step_aggregate == "last"
    assert RewardRule.of(None).step_aggregate == "last"


def test_a_score_has_the_reward_of_each_step() -> None:
    """In the oracle a step's reward is that of the tokens up to its last one; equal ids keep their own steps."""
    ids = (5, 6, 7, 8)
    sequences = [TokenSequence(ids, step_positions=(0, 2)), TokenSequence(ids), TokenSequence(ids, step_positions=(3,))]

    stepped, whole, last = (
        Pipeline(OracleEngine(), rule=RewardRule(step_aggregate="mean")).run(sequences, ["none"] * 3).outcomes
    )

    assert isinstance(stepped, Score)
    assert stepped.step_rewards == (oracle_reward(ids[:1]), oracle_reward(ids[:3]))
    assert stepped.reward == pytest.approx(sum(stepped.step_rewards) / 2)
    assert whole == Score(oracle_reward(ids))
    assert isinstance(last, Score)
    assert last.reward == oracle_reward(ids)


def test_a_step_that_is_not_finite_fails_its_item() -> None:
    """No reward is made of the other steps, and other items are not affected."""
    engine = OracleEngine(faults=OracleFaults(nan_on=9))
    sequences = [TokenSequence((5, 6, 9), step_positions=(0, 2)), TokenSequence((5, 6), step_positions=(0, 1))]

    bad, good = Pipeline(engine).run(sequences, ["none"] * 2).outcomes

    assert isinstance(bad, NonFiniteReward)
    assert isinstance(good, Score)


@pytest.mark.parametrize(
    ("steps", "refusal"),
    [
        ({}, "neither a marker nor a marker_token_id"),
        ({"marker": "x", "separate": True}, "no marker_token_id to put after each"),
        ({"marker_token_id": 400_000}, "marker_token_id 400000, but the embedding has"),
        ({"marker": "x", "aggregate": "max"}, "not a valid description"),
    ],
)
def test_a_description_that_says_too_little_is_refused(tmp_path: Path, steps: dict[str, Any], refusal: str) -> None:
    """The checkpoint is not served, and the sentence names what is missing."""
    write_tiny_checkpoint(tmp_path)
    write_description(tmp_path, RewardDescription(ClassifierHead()))
    content = json.loads((tmp_path / DESCRIPTION_FILE).read_bytes())
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps(content | {"steps": steps}))

    with pytest.raises(CheckpointError, match=refusal):
        open_checkpoint(tmp_path, ModelSettings(path=str(tmp_path)))
