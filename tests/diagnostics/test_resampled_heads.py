"""Disagreement between resampled heads: per item, within a prompt, in the calibration file, and in what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_calibration import HIDDEN, TAPS, made_up_calibration
from safetensors.numpy import load_file, save_file

from service.checkpoints.files import CALIBRATION_FILE
from service.diagnostics.calibration import Calibration, read_calibration, write_calibration
from service.diagnostics.diagnosis import Diagnostician, group_reports
from service.diagnostics.item_state import ItemState
from service.diagnostics.resampled_heads import ResampledHeads, disagreement, lower_reward
from service.errors import CalibrationError
from service.records import Exchange, Item, Score, TokenSequence

STATES = np.random.default_rng(5).normal(size=(4, len(TAPS), HIDDEN)).astype(np.float32)


def heads_of(calibration: Calibration, num_heads: int = 6) -> ResampledHeads:
    weights = np.random.default_rng(3).normal(size=(HIDDEN, num_heads)).astype(np.float32)
    return ResampledHeads(calibration.states.forms[calibration.states.head_tap].mean, weights)


@pytest.fixture(scope="module")
def without() -> Calibration:
    return made_up_calibration()


@pytest.fixture(scope="module")
def calibration(without: Calibration) -> Calibration:
    return replace(without, heads=heads_of(without), id="sha256:test")


def test_disagreement_by_hand() -> None:
    """Heads that add 1 and -1 along one axis differ by the item's coordinate; on the mean state they agree."""
    heads = ResampledHeads(np.array([1.0, 0.0], np.float32), np.array([[1.0, -1.0], [0.0, 0.0]], np.float32))

    found = disagreement(heads.deviations(np.array([[1.0, 7.0], [4.0, 7.0]], np.float32)))

    assert found == pytest.approx([0.0, 3 * np.sqrt(2)])  # divisor K - 1 = 1


def test_the_lower_reward_is_below_the_reward() -> None:
    """It is the reward less so many standard deviations, and unknown where one of the two is."""
    assert lower_reward(1.0, 0.25, 2.0) == 0.5
    assert lower_reward(1.0, None, 2.0) is None
    assert lower_reward(None, 0.25, 2.0) is None


def test_what_heads_add_to_a_whole_group_is_no_disagreement() -> None:
    """Heads that shift all completions of a prompt alike agree about which of them is better."""
    shifted = [Score(float(n), head_deviations=(0.5, -3.0, 2.0)) for n in range(3)]
    opposed = [Score(0.0, head_deviations=(1.0, -1.0)), Score(0.0, head_deviations=(-1.0, 1.0))]

    assert [report.disagreement for report in group_reports(shifted)] == pytest.approx([0.0] * 3)
    assert [report.disagreement for report in group_reports(opposed)] == pytest.approx([np.sqrt(2)] * 2)
    assert [report.disagreement for report in group_reports([opposed[0], Score(1.0)])] == [None, None]


def test_levels_and_calibrations_with_heads(calibration: Calibration, without: Calibration) -> None:
    """Level ``full`` has the disagreement of the heads, in its place beside the reward; without heads it is None."""
    expected = disagreement(heads_of(without).deviations(STATES[:, 1]))

    full = Diagnostician(calibration).read_states([0.0] * 4, STATES)
    null = Diagnostician(without).read_states([0.0] * 4, STATES)

    assert [score.reward_disagreement for score in full] == pytest.approx(expected.tolist())
    assert all(score.reward_disagreement is None and score.head_deviations is None for score in null)
    assert [score.reward_std_epistemic for score in full] == [score.reward_std_epistemic for score in null]


def test_states_that_are_not_finite_have_no_disagreement(calibration: Calibration) -> None:
    """Such an item has None, and the items beside it have their values."""
    broken = STATES.copy()
    broken[1, 1, 0] = np.inf

    found = Diagnostician(calibration).read_states([0.0] * 4, broken)

    assert [score.reward_disagreement is None for score in found] == [False, True, False, False]
    assert found[1].head_deviations is None


def test_rewards_by_weights_of_the_request_have_no_disagreement(calibration: Calibration) -> None:
    """The heads belong to the reward of the service's own weights, so those of a request leave it unknown."""
    measured = Diagnostician(calibration).read_states([0.0], STATES[:1])[0]
    item, sequence = Item(Exchange("p", "word")), TokenSequence((1, 2, 3), num_prompt_tokens=1)

    own, given = [
        Diagnostician(calibration).diagnose(
            [ItemState(item, sequence, outcome=replace(measured, own_weights=own_weights))], "full"
        )[0]
        for own_weights in (False, True)
    ]

    assert isinstance(own, Score)
    assert isinstance(given, Score)
    assert own.reward_disagreement == measured.reward_disagreement
    assert (given.reward_disagreement, given.head_deviations) == (None, None)


def test_heads_are_written_and_read(calibration: Calibration, without: Calibration, tmp_path: Path) -> None:
    """A file has the heads that were written; one without them, as older versions made, is read with None."""
    write_calibration(calibration, tmp_path / "with")
    write_calibration(without, tmp_path / "without")

    read = read_calibration(tmp_path / "with").heads

    assert read is not None
    assert read.num_heads == 6
    assert read.deviations(STATES[:, 1]) == pytest.approx(heads_of(without).deviations(STATES[:, 1]))
    assert read_calibration(tmp_path / "without").heads is None


def test_heads_of_another_size_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    """A file whose heads do not fit its states is damaged, and no part of it is used."""
    path = tmp_path / CALIBRATION_FILE
    write_calibration(calibration, path)
    arrays = load_file(path)
    header = path.read_bytes()
    text = header[8 : 8 + int.from_bytes(header[:8], "little")].decode()
    content = json.loads(json.loads(text)["__metadata__"]["calibration"])
    del content["sha256"]
    metadata = {"calibration": json.dumps(content)}
    save_file(arrays | {"resampled_heads": arrays["resampled_heads"][1:]}, path, metadata)

    with pytest.raises(CalibrationError, match="resampled_heads"):
        read_calibration(path)
