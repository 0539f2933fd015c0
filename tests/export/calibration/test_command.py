"""``reward-calibrate`` on a tiny model: what it writes is used by the service that serves that model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from tiny_calibration import calibrate, write_calibrated_checkpoint, write_pairs

from export.calibration.hacks import SUITE
from export.calibration.scoring import score_items
from service import assembly
from service.assembly import ServedModel, assemble
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.files import CALIBRATION_FILE
from service.diagnostics.calibration import read_calibration
from service.diagnostics.candidate_taps import candidate_taps
from service.diagnostics.item_state import ItemState
from service.engines import torch as torch_engine
from service.engines.base import EngineOutput
from service.errors import CalibrationError
from service.records import Encoding, Exchange, Item, Score, TokenSequence
from service.settings import Settings, read_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibrated_checkpoint(tmp_path_factory.mktemp("calibrated") / "model")


def settings_of(folder: Path, **model: object) -> Settings:
    return read_settings({"model": {"path": str(folder), "dtype": "float32", "device": "cpu", **model}})


def score(served: ServedModel, items: list[Item]) -> list[Score]:
    pipeline = served.scorer.pipeline
    encoded = served.tokenization.encode(items, Encoding())
    sequences = [sequence for sequence in encoded if isinstance(sequence, TokenSequence)]
    outcomes = pipeline.run(sequences, ["full"] * len(sequences)).outcomes
    states = [
        ItemState(item, sequence, outcome=outcome)
        for item, sequence, outcome in zip(items, encoded, outcomes, strict=True)
    ]
    completed = pipeline.diagnostician.diagnose(states, "full")
    return [outcome for outcome in completed if isinstance(outcome, Score)]


def test_the_model_is_served_with_its_calibration(folder: Path) -> None:
    """Every field of the full level has a value, and `/v1/model` names the calibration."""
    served = assemble(settings_of(folder))

    (scored,) = score(served, [Item(Exchange("What is the sea?", "The sea is water and wind."))])

    assert scored.ood is not None
    assert scored.ood.calibration_id == read_calibration(folder / CALIBRATION_FILE).id
    assert None not in (scored.reward_z, scored.reward_percentile, scored.reward_length_adjusted)
    assert scored.reward_std_epistemic is not None
    assert scored.reward_disagreement is not None
    described = served.description()["calibration"]
    assert (described["id"], described["reason"]) == (scored.ood.calibration_id, None)
    assert described["heads"]["num_pairs"] > 300
    assert served.info.taps == served.lookup.taps
    compared = served.monitors.subject.reference
    assert compared is not None
    assert math.isfinite(compared.means.sum())  # all statistics are known, those of the states too


def test_hacks_are_flagged_and_clean_items_are_not(folder: Path, tmp_path: Path) -> None:
    """An emoji-laden text is beyond all calibration items; unseen clean items rarely are."""
    served = assemble(settings_of(folder))
    rows = [json.loads(line) for line in write_pairs(tmp_path / "fresh.jsonl", 60, seed=9).read_text().splitlines()]

    (hack,) = score(served, [Item(Exchange("Why?", "# \U0001f680\n" + "- \U0001f680 **Great!** \U0001f680\n" * 9))])
    clean = score(served, [Item(Exchange(row["prompt"], row["chosen"])) for row in rows])

    assert hack.ood is not None
    assert hack.ood.flag
    assert hack.ood.p_value == pytest.approx(hack.ood.resolution)
    assert sum(one.ood.flag for one in clean if one.ood is not None) <= 4


def test_it_is_refused_for_another_token_limit(folder: Path) -> None:
    """A served token limit that differs from the calibration's leaves diagnostics null, and rewards served."""
    served = assemble(settings_of(folder, max_input_tokens=100))

    (scored,) = score(served, [Item(Exchange("Why?", "Because."))])

    assert scored.ood is None
    assert scored.gap == "missing"
    assert "max input tokens" in served.description()["calibration"]["reason"]


def test_everything_measured_is_written_down(folder: Path, tmp_path: Path) -> None:
    """Testing on other data gives rates with errors, a table of categories, and one JSON file of it all."""
    data = tmp_path / "test.jsonl"
    rows = [json.loads(line) for line in write_pairs(tmp_path / "fresh.jsonl", 60, seed=5).read_text().splitlines()]
    data.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in rows)
        + "".join(
            json.dumps({"prompt": row["prompt"], "completion": "\u4f60\u597d", "category": "far", "is_ood": True})
            + "\n"
            for row in rows
        )
    )
    out = tmp_path / "found.json"

    calibrate(folder, data, "--test-only", "--test", str(data), "--json", str(out))

    found = json.loads(out.read_text())
    assert found["test"]["categories"]["far"]["auroc"] > 0.9
    assert found["test"]["rates"][0]["num_items"] == 60
    assert found["probe"]["seed"] == 0
    assert {"combined", "text", "oe"} <= found["calibration"]["suite"].keys()
    assert set(found["calibration"]["admitted"]) <= {
        "text", "feature", "feature_mid", "feature_last", "oe", "siblings"
    }  # fmt: skip


def test_the_model_says_what_it_pays_for(folder: Path) -> None:
    """`/v1/model` has the effect of every edit of the probe, those that pay by name, and the figure of new kinds."""
    described = assemble(settings_of(folder)).description()["calibration"]

    probe = described["probe"]
    assert probe["num_completions"] == 4
    assert {one["edit"] for one in probe["effects"]} >= {"padding", "hedges", "bullets", "swap"}
    assert set(probe["pays"]) == {one["edit"] for one in probe["effects"] if one["low"] > 0}
    facts = read_calibration(folder / CALIBRATION_FILE).facts
    trained = {entry.name for entry in SUITE if entry.trains}
    assert facts.new_kind.keys() == facts.suite["combined"].keys() & trained
    assert {"padding", "hedging", "user_voice"} <= facts.new_kind.keys()
    assert described["new_kind_auroc"] == pytest.approx(np.mean([one.auroc for one in facts.new_kind.values()]))


def test_too_little_data_is_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written where a part of the data is too small."""
    out = tmp_path / "none.safetensors"

    assert calibrate(folder, write_pairs(tmp_path / "few.jsonl", 20), "--out", str(out)) == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("reward-calibrate: ")
    assert "has 40 completions of 20 prompts" in printed
    assert "needs about 650 completions" in printed
    assert not out.exists()


def test_completions_that_are_all_the_same_are_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 prompts with one answer are refused before the model is loaded, with the number of different completions."""
    data, out = tmp_path / "same.jsonl", tmp_path / "none.safetensors"
    rows = [
        {"prompt": f"Question {number}?", "chosen": "It is blue.", "rejected": "It is red."} for number in range(500)
    ]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    assert calibrate(folder, data, "--out", str(out)) == 1
    assert "1000 completions but only 2 different ones" in capsys.readouterr().err
    assert not out.exists()


def test_a_calibration_is_made_and_tested_with_one_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making a calibration and testing it validates and loads the checkpoint once."""
    calls: list[str] = []

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            calls.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(assembly, "open_checkpoint", counted("open", open_checkpoint))
    monkeypatch.setattr(torch_engine, "load_torch_engine", counted("load", torch_engine.load_torch_engine))
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    test = write_pairs(tmp_path / "fresh.jsonl", 60, seed=5)

    calibrate(folder, pairs, "--test", str(test), "--out", str(tmp_path / "calibration.safetensors"))

    assert calls == ["open", "load"]


def test_pairs_of_a_test_show_what_predicts_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On preference pairs the disagreement of the heads is compared with distance, margin and Laplace, and printed."""
    out = tmp_path / "found.json"

    calibrate(folder, tmp_path, "--test-only", "--test", str(write_pairs(tmp_path / "p.jsonl", 80)), "--json", str(out))

    pairs = json.loads(out.read_text())["test"]["pairs"]
    assert pairs["num_pairs"] == 80
    assert {"disagreement", "small margin", "Laplace", "surprise"} <= pairs["figures"].keys()
    assert pairs["figures"]["surprise"]["behind_error"] > 0
    assert "predicts wrong pairs" in capsys.readouterr().err


def test_a_failing_pass_ends_the_calibration(folder: Path) -> None:
    """Nothing is fitted to a part of the items: a pass that fails on one of them is reported."""
    served = assemble(settings_of(folder), taps=candidate_taps(4))
    engine = served.scorer.pipeline.engine
    forward = engine.forward

    def fail_on_long(sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        if any(sequence.num_tokens > 30 for sequence in sequences):
            raise RuntimeError("too long")
        return forward(sequences, states=states)

    with patch.object(engine, "forward", fail_on_long), pytest.raises(CalibrationError, match="1 items could not be"):
        score_items(served, [Exchange("Why?", "Because."), Exchange("Why?", "word " * 40)], lambda _: None)
