"""Commands on a model with two outputs: calibration, batch scoring, audit, all by the weighted sum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from http_application import checkpoint_client
from objective_models import OUTPUTS, WEIGHTS, expected_outputs, weighted_sum, write_two_outputs
from preference_rows import polite_pairs
from tiny_calibration import calibrate, write_pairs

from export.calibration import command as calibrate_command
from scoring import command as score_command
from training.audit import command as audit_command

pytestmark = pytest.mark.slow

ARGUMENTS = [f"{name}={weight}" for name, weight in WEIGHTS.items()]
ITEMS = [{"prompt": f"Question {number}?", "completion": f"Answer number {number}."} for number in range(3)]


async def score(folder: Path, weights: dict[str, float] | None, **model: Any) -> list[dict[str, Any]]:
    body: dict[str, Any] = {"items": ITEMS, "diagnostics": "full"} | ({} if weights is None else {"weights": weights})
    async with checkpoint_client(folder, **model) as client:
        answer = await client.post("/v1/score", json=body)
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


async def test_a_calibration_is_of_the_weighted_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is used with its own weights, refused with others, and inapplicable to rewards by a request's weights."""
    folder = write_two_outputs(tmp_path / "model")
    data = write_pairs(tmp_path / "pairs.jsonl")
    assert calibrate_command.main([str(folder), str(data)]) == 1
    assert "there is no reward to calibrate" in capsys.readouterr().err
    calibrate(folder, data, "--weights", *ARGUMENTS)

    for result in await score(folder, None, reward_weights=WEIGHTS):
        assert result["reward_z"] is not None
        assert result["ood"] is not None
    for result in await score(folder, {"brevity": 3.0}, reward_weights=WEIGHTS):
        figures = ("reward_z", "reward_percentile", "reward_length_adjusted", "reward_std_epistemic")
        assert [result[name] for name in figures] == [None] * 4
        assert result["calibration"] == "inapplicable"
        assert result["ood"]["p_value"] > 0
        assert result["length"]["length_z"] is not None
    for result in await score(folder, WEIGHTS, reward_weights=WEIGHTS):
        assert result["reward_z"] is not None
    for other in ({"reward_weights": {"brevity": 1.0}}, {}):
        assert all(result["calibration"] == "missing" for result in await score(folder, None, **other))


def test_batch_scores_have_a_column_for_each_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns of each output equal plain transformers, and reward is their sum, or null without weights."""
    folder = write_two_outputs(tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]} for text in "abc"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rendered = [f"<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n" for text in "abc"]
    expected = _outputs(folder, rendered)
    options = ["--model", str(folder), "--dtype", "float32", "--diagnostics", "none"]

    assert score_command.main([str(data), str(tmp_path / "a.parquet"), *options, "--weights", *ARGUMENTS]) == 0
    assert score_command.main([str(data), str(tmp_path / "b.parquet"), *options]) == 0

    weighted, bare = (pq.read_table(tmp_path / name).to_pylist() for name in ("a.parquet", "b.parquet"))
    for row, own, outputs in zip(weighted, bare, expected, strict=True):
        found = [row[f"output_{name}"] for name in OUTPUTS]
        assert found == pytest.approx(outputs, abs=1e-4)
        assert row["reward"] == pytest.approx(weighted_sum(found, WEIGHTS), abs=1e-9)
        assert own["reward"] is None
        assert [own[f"output_{name}"] for name in OUTPUTS] == found
    capsys.readouterr()
    assert score_command.main([str(data), str(tmp_path / "c.parquet"), *options, "--select", "best"]) == 1
    assert "--select needs --weights" in capsys.readouterr().err


def _outputs(folder: Path, texts: list[str]) -> list[list[float]]:
    # The tokenizer adds the BOS that the template writes too.
    return expected_outputs(folder, [text.removeprefix("<s>") for text in texts])


def test_an_audit_reports_each_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each output is compared with the pairs of its own objective, and the audit itself is of the weighted sum."""
    folder = write_two_outputs(tmp_path / "model")
    rows = [row | {"objective": OUTPUTS[index % 2]} for index, row in enumerate(polite_pairs(60))]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(folder), str(data), "--out", str(tmp_path / "report"), "--dtype", "float32"]

    assert audit_command.main(command) == 1
    assert "give --weights" in capsys.readouterr().err
    assert audit_command.main([*command, "--weights", *ARGUMENTS]) == 0

    report = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert [(found["name"], found["num_pairs"], found["labelled"]) for found in report["outputs"]] == [
        (name, 30, True) for name in OUTPUTS
    ]
    assert all(0 <= found["accuracy"]["value"] <= 1 for found in report["outputs"])
    assert "Output brevity: accuracy" in capsys.readouterr().err
    assert ">brevity</td>" in (tmp_path / "report" / "audit.html").read_text()
