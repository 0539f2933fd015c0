"""The probe: paired effects with intervals that hold, by prompt; edits that pay are named, the largest effect first."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from service.diagnostics.monitors.alarms import SIGNALS
from service.edits.probe import EDITS, Probe, ProbePlan, clustered_interval, effects_of, plan_probe
from service.records import Exchange, Message

Reward = Callable[[Exchange], float]


def exchanges(num_prompts: int, per_prompt: int = 1) -> list[Exchange]:
    return [
        Exchange((Message("user", f"Question {prompt}?"),), f"Answer {prompt} is {number}. It has two sentences.")
        for prompt in range(num_prompts)
        for number in range(per_prompt)
    ]


def probed(reward: Reward, plan: ProbePlan) -> Probe:
    return effects_of(plan, np.array([reward(one) for one in plan.exchanges]))


def noisy(reward: Reward) -> Reward:
    rng = np.random.default_rng(0)
    return lambda exchange: reward(exchange) + float(rng.normal(0, 0.01))


def test_it_finds_what_a_reward_pays_for() -> None:
    """A reward of list items and against length: bullets pay most, and padding costs."""

    def reward(exchange: Exchange) -> float:
        text = exchange.completion_text
        return 2.0 * text.count("\n- ") + 2.0 * text.count("\n* ") - 0.01 * len(text)

    found = probed(noisy(reward), plan_probe(exchanges(20), 20, 0))

    effects = {(one.edit, one.strength): one for one in found.effects}
    assert found.paying()[0].edit == "bullets"
    assert effects["padding", 4].high < 0
    assert effects["truncation", 1].pays
    assert found.signals().keys() >= {("markdown", "up"), ("log_tokens", "down")}
    assert ("log_tokens", "up") not in found.signals()


def test_pure_noise_seldom_pays() -> None:
    """Of rewards without any effect, about one interval in forty lies above zero."""
    rng = np.random.default_rng(1)
    plan = plan_probe(exchanges(30), 30, 0)

    found = [effects_of(plan, rng.normal(size=len(plan.exchanges))) for _ in range(40)]

    assert np.mean([one.pays for probe in found for one in probe.effects]) < 0.06


def test_an_effect_is_a_mean_of_paired_differences() -> None:
    """The level of a prompt's rewards cancels; the effect in standard deviations is by those of the unchanged ones."""
    plan = plan_probe(exchanges(12), 12, 0)
    base = np.arange(12) * 100.0
    rewards = np.concatenate([base, [base[source] + number for source, number in plan.sources]])

    found = effects_of(plan, rewards)

    assert found.reward_sd == pytest.approx(base.std(ddof=1))
    for number, one in enumerate(found.effects):
        assert one.effect == pytest.approx(number)
        assert (one.low, one.high) == pytest.approx((number, number))
        assert one.effect_sd == pytest.approx(number / found.reward_sd)


def test_a_text_without_a_reward_leaves_its_pair_out() -> None:
    """NaN of an edited text drops one difference, NaN of an original all of its."""
    plan = plan_probe(exchanges(10), 10, 0)
    rewards = np.zeros(len(plan.exchanges))
    rewards[0] = rewards[-1] = math.nan

    found = effects_of(plan, np.where(np.arange(len(rewards)) < 10, rewards + np.arange(10).repeat(1)[0], rewards))

    assert found.num_completions == 9
    assert all(one.num_items <= 9 for one in found.effects)


def test_completions_are_of_many_prompts() -> None:
    """No prompt is chosen twice while another has not been chosen, and completions that are no text never are."""
    tool_call = Exchange("p", (Message("assistant", None, '{"tool_calls": []}'),))

    plan = plan_probe([*exchanges(6, 4), tool_call], 8, 3)

    counts = [sum(one.prompt == prompt for one in plan.originals) for prompt in {one.prompt for one in plan.originals}]
    assert sorted(counts) == [1, 1, 1, 1, 2, 2]
    assert plan == plan_probe([*exchanges(6, 4), tool_call], 8, 3)


def test_intervals_count_prompts() -> None:
    """Equal values of one prompt are no further evidence: the interval is that of the prompts' means."""
    values = np.random.default_rng(0).normal(size=12)

    alone = clustered_interval(values, np.arange(12))
    repeated = clustered_interval(np.repeat(values, 5), np.repeat(np.arange(12), 5))

    assert repeated == pytest.approx(alone)
    half_width = 2.201 * values.std(ddof=1) / math.sqrt(12)
    assert alone == pytest.approx((values.mean(), values.mean() - half_width, values.mean() + half_width), abs=1e-3)


def test_too_few_prompts_have_no_effects() -> None:
    """Two prompts give no interval worth showing, and an empty plan no completion."""
    assert probed(lambda _: 1.0, plan_probe(exchanges(2), 2, 0)).effects == []
    assert effects_of(plan_probe([], 5, 0), np.array([])).num_completions == 0


def test_signals_are_those_of_the_monitors() -> None:
    """Every edit names a drift signal that exists, or none."""
    assert {edit.signal for edit in EDITS} - {None} <= set(SIGNALS)


def test_the_record_is_read_as_it_was_written() -> None:
    """JSON and back gives the same record, and another type is an error."""
    found = probed(noisy(lambda _: 0.0), plan_probe(exchanges(5), 5, 0))

    assert Probe.from_json(found.as_json()) == found
    with pytest.raises(ValueError, match="effects"):
        Probe.from_json(found.as_json() | {"effects": 1})
