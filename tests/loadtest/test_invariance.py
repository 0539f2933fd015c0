"""The effect of the batch composition on rewards is found where there is one, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.batch_effect import measure_batch_effect
from loadtest.engine_work import Work
from loadtest.invariance import main
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint
from service.engines.base import EngineOutput
from service.engines.oracle import OracleEngine
from service.records import TokenSequence

TINY = ModelShape(vocabulary=1200, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, positions=512)


class BatchDependentEngine(OracleEngine):
    """An oracle whose reward of one sequence is different in a batch with others."""

    def forward(self, sequences, *, states=False):
        output = super().forward(sequences, states=states)
        rewards = [
            reward + 0.25 * (len(sequences) > 1 and sequence.token_ids == (1, 2))
            for sequence, reward in zip(sequences, output.rewards, strict=True)
        ]
        return EngineOutput(rewards)


@pytest.mark.parametrize(
    ("engine", "num_changed", "difference"), [(OracleEngine, 0, 0.0), (BatchDependentEngine, 1, 0.25)]
)
def test_the_effect_is_measured(engine, num_changed: int, difference: float) -> None:
    """A batch-invariant engine changes no reward; for another one changed items and difference are reported."""
    work = Work((TokenSequence((1, 2)), TokenSequence((3,)), TokenSequence((4, 5, 6))), (0, 1, 2))

    found = measure_batch_effect(engine(max_input_tokens=16, max_batch_tokens=64), work, seed=0)

    assert (found.num_items, found.num_changed) == (3, num_changed)
    assert found.max_difference == pytest.approx(difference)


def test_the_command_measures_engines(tmp_path: Path) -> None:
    """Each dtype, with and without CPU kernels: no reward changes in bfloat16, and none on the kernels."""
    model = write_random_checkpoint(tmp_path / "model", TINY, "float32")
    report = tmp_path / "found.json"

    status = main(["--model", str(model), "--items", "16", "--device", "cpu", "--json", str(report)])

    found = json.loads(report.read_text())
    assert status == 0
    assert len(found) == 4
    exact = [one for one in found if "bfloat16" in one["engine"] or "kernels" in one["engine"]]
    assert {one["num_changed"] for one in exact} == {0}
    assert all(one["max_difference"] <= 1e-5 for one in found)


def test_the_command_measures_batch_invariant_engines(tmp_path: Path) -> None:
    """With the setting no reward changes in float32 either."""
    model = write_random_checkpoint(tmp_path / "model", TINY, "float32")
    report = tmp_path / "found.json"
    options = ["--items", "16", "--device", "cpu", "--dtypes", "float32", "--batch-invariant"]

    status = main(["--model", str(model), *options, "--json", str(report)])

    found = json.loads(report.read_text())
    assert status == 0
    assert all(one["engine"].endswith("batch-invariant") for one in found)
    assert [(one["num_changed"], one["max_difference"]) for one in found] == [(0, 0), (0, 0)]
