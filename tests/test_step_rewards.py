"""How the outputs at steps become step rewards and the reward of a text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_checkpoint

from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.reward_description import (
    DESCRIPTION_FILE,
    ClassifierHead,
    Combination,
    LogProbability,
    LowerBound,
    MeanOfOutputs,
    MinOfOutputs,
    Probability,
    RewardDescription,
    StepRule,
    WeightedSum,
    write_description,
)
from service.engines.base import EngineOutput
from service.engines.oracle import OracleEngine, OracleFaults, oracle_reward
from service.errors import CheckpointError, NonFiniteReward
from service.pipeline import Pipeline
from service.records import Score, StepAggregate, TokenSequence
from service.reward_rule import RewardRule
from service.settings import ModelSettings

STEPS = [0.5, 0.25, 0.75]


class TwoOutputs(OracleEngine):
    """An engine with two outputs for each of the given token ids."""

    def __init__(self, outputs: dict[tuple[int, ...], list[float]]) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        """Return the given outputs."""
        output = super().forward(sequences, states=states)
        found = [np.array([self._outputs[sequence.row]], np.float32) for sequence in sequences]
        return replace(output, outputs=found)


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


BAD = (math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("other", [1.0, -math.inf])
@pytest.mark.parametrize(
    "combine",
    [WeightedSum({"a": 1.0, "b": 1.0}), MeanOfOutputs(), LowerBound(1.0), Probability("a"), LogProbability("b")],
)
def test_a_number_that_is_not_finite_is_never_an_exception(combine: Combination, bad: float, other: float) -> None:
    """The rules give NaN or infinity, never an exception: that would fail all items of the batch."""
    rule = RewardRule(("a", "b"), combine)

    for outputs in ([bad, other], [other, bad]):
        reward = rule.reward_of(outputs)
        assert reward is not None
        assert not math.isfinite(reward)
        assert not math.isfinite(rule.std_of(outputs) or math.nan)


def test_a_sum_beyond_float64_is_no_number() -> None:
    """Weights of a request may be that large; ``math.fsum`` would raise."""
    rule = RewardRule(("a", "b"), step_aggregate="mean")

    for outputs in ([1.0, 1.0], [10.0, -10.0], [10.0, 10.0]):
        reward = rule.reward_of(outputs, {"a": 1.5e308, "b": 1.5e308})
        assert reward is not None
        assert not math.isfinite(reward)
    assert not math.isfinite(rule.aggregate([1.5e308, 1.5e308]))
    assert rule.reward_of([2.0, 3.0], {"a": 0.5, "b": -1.0}) == -2.0


@pytest.mark.parametrize("combine", [LowerBound(1.0), MeanOfOutputs(), MinOfOutputs(), WeightedSum({"a": 1.0})])
def test_a_member_that_is_not_finite_fails_its_item_alone(combine: Combination) -> None:
    """The other items of the batch get their rewards."""
    engine = TwoOutputs({(7,): [math.inf, math.nan], (8,): [1.0, 3.0]})
    rule = RewardRule(("a", "b"), combine)

    bad, good = Pipeline(engine, rule=rule).run([TokenSequence((7,)), TokenSequence((8,))], ["none"] * 2).outcomes

    assert isinstance(bad, NonFiniteReward)
    assert isinstance(good, Score)
    assert good.reward == {LowerBound: 1.0, MeanOfOutputs: 2.0, MinOfOutputs: 1.0, WeightedSum: 1.0}[type(combine)]


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
