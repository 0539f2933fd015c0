"""Diagnostics of the items of a request, with and without a calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from made_up_calibration import HIDDEN, NUM_ITEMS, TAPS, made_up_calibration
from reward_client.options import DiagnosticsLevel

from service.diagnostics.calibration import Calibration
from service.diagnostics.diagnosis import Diagnostician, group_reports, siblings_of
from service.diagnostics.item_state import ItemState, Outcome
from service.engines.base import EngineInfo, EngineOutput
from service.errors import EngineFailed
from service.pipeline import Pipeline
from service.records import (
    Exchange,
    Item,
    LengthReport,
    Score,
    StateTap,
    TemplatedText,
    TokenIds,
    TokenSequence,
)

_RNG = np.random.default_rng(0)
STATES = _RNG.normal(size=(64, len(TAPS), HIDDEN)).astype(np.float32)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return replace(made_up_calibration(), id="sha256:test")


class StateEngine:
    """Rewards by the number of tokens; the states are looked up by the first token."""

    def __init__(self, taps: tuple[StateTap, ...] = TAPS, states: np.ndarray = STATES) -> None:
        self.info = EngineInfo("test", "Test", "packed", "cpu", "float32", "packed", 512, 4096, taps=taps)
        self.states = states
        self.num_state_passes = 0

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        self.num_state_passes += states
        rewards = [float(sequence.num_tokens) for sequence in sequences]
        return EngineOutput(rewards, states=self.states[[one.token_ids[0] for one in sequences]] if states else None)

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        return 0

    def close(self) -> None: ...


def items_of(count: int, *, same_prompt: bool = False) -> tuple[list[Item], list[TokenSequence]]:
    """Items whose tokens differ in number, so that rewards do."""
    items = [Item(Exchange("same" if same_prompt else f"p{n}", f"word {n} " * (n + 3))) for n in range(count)]
    sequences = [TokenSequence((n, *range(20, 30 + n)), num_prompt_tokens=4) for n in range(count)]
    return items, sequences


def states_of(
    items: Sequence[Item], sequences: Sequence[TokenSequence], outcomes: Sequence[Outcome]
) -> list[ItemState]:
    return [
        ItemState(item, sequence, outcome=outcome)
        for item, sequence, outcome in zip(items, sequences, outcomes, strict=True)
    ]


def diagnose(
    diagnostician: Diagnostician,
    items: list[Item],
    sequences: list[TokenSequence],
    level: DiagnosticsLevel,
    engine: StateEngine | None = None,
) -> list[Score]:
    outcomes = Pipeline(engine or StateEngine(), diagnostician).run(sequences, [level] * len(items)).outcomes
    completed = diagnostician.diagnose(states_of(items, sequences, outcomes), level)
    return [outcome for outcome in completed if isinstance(outcome, Score)]


def test_the_reward_is_the_same_at_every_level(calibration: Calibration) -> None:
    """The reward is bit-identical at all levels, with and without a calibration."""
    items, sequences = items_of(6)
    rewards = [
        [score.reward for score in diagnose(Diagnostician(used), items, sequences, level)]
        for used in (None, calibration)
        for level in ("none", "basic", "full")
    ]

    assert all(found == rewards[0] for found in rewards)


def test_levels(calibration: Calibration) -> None:
    """``none`` has no diagnostics, ``basic`` those without states, ``full`` all; states are read for ``full`` only."""
    items, sequences = items_of(1)
    engine = StateEngine()
    none, basic, full = [
        diagnose(Diagnostician(calibration), items, sequences, level, engine)[0] for level in ("none", "basic", "full")
    ]

    assert none == Score(none.reward)
    assert basic.ood is None
    assert basic.reward_std_epistemic is None
    assert basic.style is not None
    assert basic.style.repeat4 is None
    assert basic.length is not None
    assert basic.length.length_z is not None
    assert basic.reward is not None
    assert basic.reward_z == pytest.approx(calibration.rewards.z(basic.reward))
    assert basic.reward_length_adjusted is not None
    assert full.ood is not None
    assert full.ood.mode == "single"
    assert full.ood.calibration_id == "sha256:test"
    assert full.ood.resolution == pytest.approx(1 / (NUM_ITEMS + 1))
    assert full.style is not None
    assert full.style.style_p is not None
    assert full.reward_std_epistemic is not None
    assert full.reward_std_epistemic > 0
    assert engine.num_state_passes == 1


def test_without_a_calibration_its_fields_are_none() -> None:
    """Fields that require a calibration are None; lengths, style counts and groups are still reported."""
    items, sequences = items_of(3, same_prompt=True)

    scores = diagnose(Diagnostician(None), items, sequences, "full")

    for score in scores:
        assert score.gap == "missing"
        assert score.ood is None
        assert score.reward_z is score.reward_percentile is score.reward_std_epistemic is None
        assert score.style is not None
        assert score.style.style_p is None
        assert score.style.repeat4 is not None
        assert score.length is not None
        assert score.length.length_z is None
        assert score.group is not None


@pytest.mark.parametrize("content", [TemplatedText("text"), TokenIds((1, 2))])
def test_without_separate_texts_there_is_no_ood_block(
    calibration: Calibration, content: TemplatedText | TokenIds
) -> None:
    """Where prompt and completion cannot be separated, no statistics are calibrated, so there is no p-value."""
    (score,) = diagnose(Diagnostician(calibration), [Item(content)], [TokenSequence((1, 2, 3))], "full")

    assert score.gap == "inapplicable"
    assert score.ood is None
    assert score.style is None
    assert score.reward_z is not None
    assert score.reward_length_adjusted is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_flagged(calibration: Calibration, value: float) -> None:
    """An item with such states gets the smallest p-value; the other items of the batch are unchanged."""
    items, sequences = items_of(3)
    broken = STATES.copy()
    broken[1, 0, 0] = value

    clean = diagnose(Diagnostician(calibration), items, sequences, "full")
    scores = diagnose(Diagnostician(calibration), items, sequences, "full", StateEngine(states=broken))

    assert [score.ood for score in scores[::2]] == [score.ood for score in clean[::2]]
    odd = scores[1].ood
    assert odd is not None
    assert (odd.reason, odd.flag, odd.p_value, odd.score) == ("nonfinite", True, odd.resolution, None)
    assert math.isfinite(odd.surprise)


def test_five_siblings_are_compared(calibration: Calibration) -> None:
    """With five or more completions of one prompt the mode is ``group``, and ``p_group`` is reported."""
    for count, mode in ((4, "single"), (5, "group")):
        items, sequences = items_of(count, same_prompt=True)
        for score in diagnose(Diagnostician(calibration), items, sequences, "full"):
            assert score.ood is not None
            assert score.ood.mode == mode
            assert (score.ood.p_group is not None) == (mode == "group")


def test_taps_are_found_among_those_of_the_engine(calibration: Calibration) -> None:
    """An engine that reads more states, in another order, gives the same reports."""
    items, sequences = items_of(4)
    more = (StateTap(9, "last"), TAPS[1], TAPS[0])
    states = np.concatenate([np.full_like(STATES[:, :1], 7), STATES[:, 1:], STATES[:, :1]], axis=1)

    expected = diagnose(Diagnostician(calibration), items, sequences, "full")
    found = diagnose(Diagnostician(calibration, taps=more), items, sequences, "full", StateEngine(more, states=states))

    for left, right in zip(found, expected, strict=True):
        assert left.ood is not None
        assert right.ood is not None
        assert left.traits == pytest.approx(right.traits, rel=1e-5)
        assert (left.ood.p_value, left.ood.reason) == (right.ood.p_value, right.ood.reason)
        assert left.reward_std_epistemic == pytest.approx(right.reward_std_epistemic, rel=1e-5)


def test_truncated_items_are_marked(calibration: Calibration) -> None:
    """The report of a truncated item has ``valid_for_tail`` false."""
    items, sequences = items_of(1)

    (score,) = diagnose(Diagnostician(calibration), items, [replace(sequences[0], num_dropped=3)], "full")

    assert score.ood is not None
    assert not score.ood.valid_for_tail


def test_errors_are_returned_unchanged(calibration: Calibration) -> None:
    """An item without a reward is in no group and gets no diagnostics."""
    items, sequences = items_of(3, same_prompt=True)
    failure = EngineFailed("no")

    first, error, last = Diagnostician(calibration).diagnose(
        states_of(items, sequences, [Score(1.0), failure, Score(2.0)]), "basic"
    )

    assert error is failure
    assert isinstance(first, Score)
    assert isinstance(last, Score)
    assert first.group is not None
    assert (first.group.n, first.group.reward_centered) == (2, -0.5)


def test_siblings_by_name_or_by_prompt() -> None:
    """A group's name takes precedence over the prompt; items without a separate prompt are grouped by name only."""
    items = [
        Item(Exchange("p", "a")),
        Item(Exchange("p", "b")),
        Item(Exchange("p", "c"), group="g"),
        Item(TokenIds((1,)), group="g"),
        Item(TemplatedText("t")),
        Item(TemplatedText("t")),
    ]
    states = [ItemState(item, TokenSequence((1,))) for item in items]

    assert siblings_of(states, set(range(6))) == [[0, 1], [2, 3]]
    assert siblings_of(states, {0, 2, 3}) == [[2, 3]]


def test_group_by_hand() -> None:
    """Rewards that rise with length are correlated with it; without variation there is no correlation."""

    def score(reward: float, tokens: int) -> Score:
        return Score(reward, LengthReport(1, tokens, 1, tokens + 1, truncated=False))

    rising = group_reports([score(1.0, 9), score(2.0, 99), score(3.0, 999)])
    flat = group_reports([score(0.1, 9), score(0.1, 99), score(0.1, 999)])
    pair = group_reports([score(1.0, 9), score(2.0, 99)])

    assert rising[0].length_corr == pytest.approx(1.0, abs=1e-3)
    assert [report.reward_centered for report in rising] == [-1.0, 0.0, 1.0]
    assert flat[0].length_corr is pair[0].length_corr is None
