"""Weights of several outputs: in a request, in a rule, and what they change of a Score."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from service.checkpoints.reward_description import MeanOfOutputs, WeightedSum
from service.diagnostics.diagnosis import Diagnostician
from service.diagnostics.item_state import ItemState, Outcome
from service.diagnostics.monitors.monitor import Monitors, describe_state
from service.errors import InvalidRequest, NonFiniteReward, SettingsError, WeightsMissing
from service.protocols.native import RequestDefaults, parse_compare_request, parse_score_request
from service.protocols.native_answers import render_scores
from service.records import (
    Exchange,
    Item,
    LengthReport,
    ModelIdentity,
    Score,
    Timings,
    TokenSequence,
    Usage,
)
from service.request_weights import with_weights
from service.reward_rule import RewardRule
from service.settings import LimitSettings, MonitorSettings, read_settings

OUTPUTS = ("help", "a/b~c")
TWO = RequestDefaults(LimitSettings(), "error", "basic", OUTPUTS, has_reward=False)
ONE = RequestDefaults(LimitSettings(), "error", "basic")
RULE = RewardRule(OUTPUTS, WeightedSum({"help": 2.0}))


def body(**fields: Any) -> bytes:
    return json.dumps({"items": [{"text": "t"}]} | fields).encode()


def test_weights_of_a_request() -> None:
    """Weights are read as they are given, for scores and comparisons; without them there are none."""
    comparison = json.dumps({"prompt": "p", "completions": ["a", "b"], "weights": {"help": 1}}).encode()

    assert parse_score_request(body(weights={"a/b~c": -0.5}), TWO).weights == {"a/b~c": -0.5}
    assert parse_compare_request(comparison, TWO).weights == {"help": 1}
    assert parse_score_request(body(), TWO).weights is None


@pytest.mark.parametrize(
    ("weights", "pointer"),
    [
        ('{"help": 1e999}', "/weights"),
        ('{"a/b~c": -1e999}', "/weights"),
        ("{}", "/weights"),
        ('{"canary": 1}', "/weights"),
        ('{"help": null}', "/weights"),
        ("3", "/weights"),
    ],
)
def test_wrong_weights_have_a_pointer(weights: str, pointer: str) -> None:
    """Weights that are not finite, empty, unknown or of another type are refused; no unknown name is repeated."""
    with pytest.raises(InvalidRequest) as caught:
        parse_score_request(body()[:-1] + f', "weights": {weights}}}'.encode(), TWO)

    assert caught.value.violations[0].pointer.startswith(pointer)
    assert "canary" not in str(caught.value)


def test_a_model_with_one_output_takes_no_weights() -> None:
    """There is nothing to weigh, and the error says so instead of scaling the reward."""
    with pytest.raises(InvalidRequest, match="leave weights out"):
        parse_score_request(body(weights={"reward": 2.0}), ONE)


def test_a_comparison_needs_weights() -> None:
    """Without weights of the service a comparison is refused before any work, and says what to send."""
    with pytest.raises(WeightsMissing, match=r"send weights, or set model\.reward_weights"):
        parse_compare_request(json.dumps({"prompt": "p", "completions": ["a", "b"]}).encode(), TWO)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (Score(1.5), {"reward": 1.5}),
        (Score(3.0, outputs=(1.5, 2.0)), {"reward": 3.0, "rewards": {"help": 1.5, "a/b~c": 2.0}}),
        (Score(None, outputs=(1.5, 2.0)), {"rewards": {"help": 1.5, "a/b~c": 2.0}}),
    ],
)
def test_results_have_named_rewards(score: Score, expected: dict[str, Any]) -> None:
    """Outputs are there by name where the model has several, and reward only where it is known."""
    request = parse_score_request(body(diagnostics="none"), TWO)
    answer = render_scores(request, [score], ModelIdentity("m", "1"), "chat", Usage(), Timings(), OUTPUTS)

    assert json.loads(answer)["results"] == [{"index": 0, **expected}]


def test_weights_make_the_reward_again() -> None:
    """The reward is the sum by the request's weights, errors are unchanged, and sums that overflow become errors."""
    failed = NonFiniteReward("no")
    scores: list[Outcome] = [Score(2.0, outputs=(1.0, 10.0)), failed, Score(1e38, outputs=(1e38, 1e38))]

    first, second, third = with_weights(scores, RULE, {"a/b~c": 1e300})

    assert isinstance(first, Score)
    assert (first.reward, first.own_weights) == (1e301, True)
    assert first.outputs == (1.0, 10.0)
    assert second is failed
    assert isinstance(third, NonFiniteReward)


def test_weights_of_the_service_are_not_own_weights() -> None:
    """A request that sends the service's own weights gets calibrated figures as without them."""
    scores = [Score(2.0, outputs=(1.0, 10.0))]

    assert with_weights(scores, RULE, {"help": 2, "a/b~c": 0}) == scores


def test_weights_apply_to_the_steps() -> None:
    """With steps the weights make the reward of each step, and the reward is their aggregate."""
    score = Score(0.0, step_outputs=((1.0, 2.0), (3.0, -4.0)), step_rewards=(0.0, 0.0))
    [weighted] = with_weights([score], RewardRule(OUTPUTS, step_aggregate="min"), {"a/b~c": 2.0})

    assert isinstance(weighted, Score)
    assert (weighted.step_rewards, weighted.reward) == ((4.0, -8.0), -8.0)


def test_settings_replace_the_weights_of_the_checkpoint() -> None:
    """Weights of the settings take precedence, and the description says who decided."""
    assert RewardRule(OUTPUTS, MeanOfOutputs()).weighted({"help": 1.0}).description() == {
        "outputs": list(OUTPUTS),
        "combination": "weights",
        "weights": {"help": 1.0},
        "decided_by": "settings",
    }
    assert RewardRule(OUTPUTS, MeanOfOutputs()).description()["combination"] == "mean"
    assert RewardRule().description()["combination"] == "output"
    assert not RewardRule(OUTPUTS).has_reward
    with pytest.raises(SettingsError, match="names other"):
        RewardRule(OUTPUTS).weighted({"other": 1.0})
    with pytest.raises(SettingsError, match="this one has one"):
        RewardRule().weighted({"reward": 1.0})


@pytest.mark.parametrize("weights", [{}, {"help": math.inf}, {"help": "x"}, [1.0]])
def test_settings_refuse_weights_that_are_none(weights: Any) -> None:
    """Empty and infinite weights, and weights of another form, are no setting."""
    with pytest.raises(SettingsError, match=r"model\.reward_weights"):
        read_settings({"model": {"reward_weights": weights}})


def states_of(*scores: Score) -> list[ItemState]:
    sequence = TokenSequence((1, 2, 3), num_prompt_tokens=1)
    return [ItemState(Item(Exchange("p", "c")), sequence, outcome=score) for score in scores]


def test_no_group_without_rewards() -> None:
    """Completions without a reward are not compared with each other; everything else is reported."""
    for reward, has_group in ((None, False), (1.0, True)):
        scores = [Score(reward, outputs=(1.0, 2.0))] * 2
        for outcome in Diagnostician(None).diagnose(states_of(*scores), "basic"):
            assert isinstance(outcome, Score)
            assert isinstance(outcome.length, LengthReport)
            assert outcome.outputs == (1.0, 2.0)
            assert (outcome.group is not None) == has_group


def test_monitors_read_outputs_whatever_the_weights() -> None:
    """Rewards by own weights, or none, are unknown to the monitors, while every output is observed."""
    monitors = Monitors(MonitorSettings(), None)
    monitors.observe_request(
        states_of(Score(None, outputs=(1.0, 5.0)), Score(9.0, outputs=(3.0, 7.0), own_weights=True))
    )
    state = monitors.state()
    assert state is not None

    readings = describe_state(state, None, monitors.settings, OUTPUTS)["monitors"]

    found = {reading["feature"]: reading for reading in readings if reading["name"] == "output_mean"}
    assert {name: found[name]["value"] for name in OUTPUTS} == {"help": 2.0, "a/b~c": 6.0}
    assert state.statistics.rewards.count == 0
    assert state.merged(state).statistics.outputs.pooled[0].count == 4
