"""The artifact: written and read without loss, refused for another model or other settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_calibration import BINDING, COLUMNS, TAPS, made_up_calibration
from observed_streams import worded_stream
from safetensors import safe_open
from safetensors.numpy import save_file

from export.calibration.drift import drift_reference
from service.checkpoints.files import CALIBRATION_FILE
from service.diagnostics.calibration import Calibration, read_calibration, write_calibration
from service.diagnostics.lookup import find_calibration
from service.diagnostics.monitors.drift_monitor import groups_of
from service.diagnostics.ood import OodDetector
from service.edits.probe import EditEffect, Probe
from service.errors import CalibrationError
from service.records import OodReport, StateTap


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return made_up_calibration()


def report(calibration: Calibration, statistics: np.ndarray) -> list[OodReport]:
    detector = OodDetector(calibration.detectors, calibration.ranking, "id", 0.01)
    return detector.report(statistics, [True] * len(statistics), [np.arange(len(statistics))])


def test_a_calibration_that_was_read_gives_the_same_reports(calibration: Calibration, tmp_path: Path) -> None:
    """No number of any report changes by writing and reading the file."""
    id_ = write_calibration(calibration, tmp_path / CALIBRATION_FILE)

    read = read_calibration(tmp_path / CALIBRATION_FILE)

    statistics = np.random.default_rng(1).normal(size=(40, COLUMNS)) * 2
    assert report(read, statistics) == report(calibration, statistics)
    states = np.random.default_rng(2).normal(size=(5, len(TAPS), 8)).astype(np.float32)
    assert read.states.statistics(states) == pytest.approx(calibration.states.statistics(states))
    assert read.states.reward_std(states) == pytest.approx(calibration.states.reward_std(states))
    statistics, stds = read.states.read(states)
    assert statistics.tolist() == read.states.statistics(states).tolist()
    assert stds is not None
    assert stds.tolist() == pytest.approx(read.states.reward_std(states))
    assert read.ngrams.surprisal((1, 2, 3)) == calibration.ngrams.surprisal((1, 2, 3))
    assert read.length_curve.adjusted(1.0, 40) == calibration.length_curve.adjusted(1.0, 40)
    assert read.rewards.percentile(0.3) == calibration.rewards.percentile(0.3)
    assert read.monitors.as_arrays().keys() == calibration.monitors.as_arrays().keys()
    assert (read.id, read.binding, read.facts) == (id_, BINDING, calibration.facts)
    assert id_.startswith("sha256:")


def test_the_drift_reference_is_one_optional_entry(calibration: Calibration, tmp_path: Path) -> None:
    """A calibration without it is read as before; with it, what was fitted is read, and no other number changes."""
    plain, extended = tmp_path / "plain.safetensors", tmp_path / "extended.safetensors"
    drift = drift_reference(groups_of(worded_stream(130, seed=0)), TAPS)
    assert drift is not None

    write_calibration(calibration, plain)
    write_calibration(replace(calibration, drift=drift), extended)

    read = read_calibration(extended)
    assert read_calibration(plain).drift is None
    assert read.drift is not None
    assert (read.drift.columns, read.drift.num_items) == (drift.columns, 256)
    assert np.array_equal(read.drift.means, drift.means, equal_nan=True)
    assert np.isnan(read.drift.means[-1])  # of the states, which these items do not have
    assert drift_reference(groups_of(worded_stream(100, seed=0)), TAPS) is None
    assert report(read, np.zeros((1, COLUMNS))) == report(calibration, np.zeros((1, COLUMNS)))


def test_a_probe_is_optional(calibration: Calibration, tmp_path: Path) -> None:
    """A calibration is written and read with and without a probe, and the model's description says which."""
    found = Probe(3, 0.5, 0, [EditEffect("emoji", 4, "text", "emoji", "up", 3, 3, 0.2, 0.1, 0.3, 0.4, 0.2, 0.6, 1.0)])

    for probe in (None, found):
        write_calibration(replace(calibration, probe=probe), tmp_path / CALIBRATION_FILE)
        described = find_calibration(tmp_path, None, BINDING).description()["probe"]
        assert read_calibration(tmp_path / CALIBRATION_FILE).probe == probe
        assert (described is None) == (probe is None)
    assert described["pays"] == ["emoji"]


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "other"},
        {"tokenizer": "other"},
        {"chat_template": "other"},
        {"template": "concat"},
        {"max_input_tokens": 511},
        {"pooling": "last"},
        {"vocab_size": 301},
        {"lexicon": "0"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_it_is_refused_for_another_model_or_setting(
    calibration: Calibration, tmp_path: Path, change: dict[str, Any]
) -> None:
    """A calibration is used only for its own model and settings, and the reason names the difference."""
    write_calibration(calibration, tmp_path / CALIBRATION_FILE)

    lookup = find_calibration(tmp_path, None, replace(BINDING, **change))

    assert lookup.calibration is None
    assert lookup.taps == ()
    assert next(iter(change)).replace("_", " ") in str(lookup.description()["reason"])


def test_it_is_used_for_its_model(calibration: Calibration, tmp_path: Path) -> None:
    """It is found in the checkpoint folder or at the path of the settings, and is described by its id."""
    write_calibration(calibration, tmp_path / CALIBRATION_FILE)
    write_calibration(calibration, tmp_path / "elsewhere")

    for named in (None, str(tmp_path / "elsewhere")):
        lookup = find_calibration(tmp_path, named, BINDING)
        assert lookup.taps == TAPS
        assert lookup.description()["id"] == read_calibration(tmp_path / CALIBRATION_FILE).id
        assert lookup.checked(TAPS, {"dtype": "float32"}) is lookup


def test_it_is_refused_for_an_engine_without_its_taps(calibration: Calibration, tmp_path: Path) -> None:
    """States of other layers have other distributions."""
    write_calibration(calibration, tmp_path / CALIBRATION_FILE)

    lookup = find_calibration(tmp_path, None, BINDING).checked((StateTap(1, "last"),), {})

    assert lookup.calibration is None
    assert "hidden states" in str(lookup.reason)


def test_a_missing_calibration_is_not_an_error(tmp_path: Path) -> None:
    """A model without one is served, and the reason names the command; a file that was named must exist."""
    assert "reward-calibrate" in str(find_calibration(tmp_path, None, BINDING).reason)
    assert "no file" in str(find_calibration(tmp_path, str(tmp_path / "none"), BINDING).reason)


def _reversed(arrays: dict[str, Any]) -> None:
    arrays["cal_scores_single"] = np.ascontiguousarray(arrays["cal_scores_single"][::-1])


def _swapped(arrays: dict[str, Any]) -> None:
    arrays["ref_reward_q"], arrays["ref_loglen_q"] = arrays["ref_loglen_q"], arrays["ref_reward_q"]


def _narrowed(arrays: dict[str, Any]) -> None:
    arrays["mu"] = arrays["mu"].astype(np.int8)


def _emptied(arrays: dict[str, Any]) -> None:
    arrays["cal_scores_single"] = arrays["cal_scores_single"][:0]


def _flipped(arrays: dict[str, Any]) -> None:
    arrays["mu"].view(np.uint8).flat[3] ^= 0x40


@pytest.mark.parametrize("damage", [_reversed, _swapped, _narrowed, _emptied, _flipped])
def test_a_changed_tensor_is_refused(
    calibration: Calibration, tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    """A file in which a tensor is not what was written is damaged, however valid it looks."""
    path = tmp_path / CALIBRATION_FILE
    write_calibration(calibration, path)
    metadata, arrays = _content(path)
    damage(arrays)
    save_file(arrays, path, metadata)

    with pytest.raises(CalibrationError, match="damaged"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [("head_tap", 99), ("maps", None), ("maps", []), ("rewards", [0.0]), ("taps", 3), ("text_tests", None)],
)
def test_a_changed_header_is_refused(calibration: Calibration, tmp_path: Path, part: str, value: Any) -> None:
    """So is a changed header, with the checksum and, in a calibration that was made before it, without."""
    path = tmp_path / CALIBRATION_FILE
    write_calibration(calibration, path)
    metadata, arrays = _content(path)
    header = json.loads(metadata["calibration"])
    header["shapes"][part] = value
    for changed in (header, {name: entry for name, entry in header.items() if name != "sha256"}):
        save_file(arrays, path, {"calibration": json.dumps(changed)})
        with pytest.raises(CalibrationError, match="damaged"):
            read_calibration(path)


@pytest.mark.parametrize("header", ["[]", "null", "5", "{}"])
def test_a_header_of_another_kind_is_refused(calibration: Calibration, tmp_path: Path, header: str) -> None:
    """A header that is no object, or of no format, is another format."""
    path = tmp_path / CALIBRATION_FILE
    write_calibration(calibration, path)
    save_file(_content(path)[1], path, {"calibration": header})

    with pytest.raises(CalibrationError, match="format None"):
        read_calibration(path)


def test_a_calibration_without_a_checksum_is_read(calibration: Calibration, tmp_path: Path) -> None:
    """Calibrations that were made before there was a checksum are used as before."""
    path = tmp_path / CALIBRATION_FILE
    write_calibration(calibration, path)
    metadata, arrays = _content(path)
    header = json.loads(metadata["calibration"])
    del header["sha256"]
    save_file(arrays, path, {"calibration": json.dumps(header)})

    assert read_calibration(path).facts == calibration.facts


def _content(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata()), {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"\x10\0\0\0\0\0\0\0{}              "])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file that cannot be read is an error, and no part of it is used."""
    (tmp_path / CALIBRATION_FILE).write_bytes(content)

    with pytest.raises(CalibrationError):
        read_calibration(tmp_path / CALIBRATION_FILE)
    assert find_calibration(tmp_path, None, BINDING).calibration is None
