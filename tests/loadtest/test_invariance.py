"""What a text's company does to its reward is found where something is done, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.engine_work import Work
from loadtest.invariance import main, movement
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint
from service.engines.base import EngineOutput
from service.engines.oracle import OracleEngine
from service.records import TokenSequence

TINY = ModelShape(vocabulary=1200, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, positions=512)


class Swayed(OracleEngine):
    """An oracle whose reward of one sequence moves where it is not alone."""

    def forward(self, sequences, *, states=False):
        output = super().forward(sequences, states=states)
        rewards = [
            reward + 0.25 * (len(sequences) > 1 and sequence.token_ids == (1, 2))
            for sequence, reward in zip(sequences, output.rewards, strict=True)
        ]
        return EngineOutput(rewards)


@pytest.mark.parametrize(("engine", "num_moved", "difference"), [(OracleEngine, 0, 0.0), (Swayed, 1, 0.25)])
def test_movement_is_found_where_there_is_some(engine, num_moved: int, difference: float) -> None:
    """An engine that minds no company moves nothing; one that does is caught with the size of its move."""
    work = Work((TokenSequence((1, 2)), TokenSequence((3,)), TokenSequence((4, 5, 6))), (0, 1, 2))

    found = movement(engine(max_input_tokens=16, max_batch_tokens=64), work, seed=0)

    assert (found.num_items, found.num_moved) == (3, num_moved)
    assert found.max_difference == pytest.approx(difference)


def test_the_command_measures_engines(tmp_path: Path) -> None:
    """It loads the checkpoint in each arithmetic, and on a CPU no bfloat16 reward moves, with and without kernels."""
    model = write_random_checkpoint(tmp_path / "model", TINY, "float32")
    report = tmp_path / "found.json"

    status = main(["--model", str(model), "--items", "16", "--device", "cpu", "--json", str(report)])

    found = json.loads(report.read_text())
    assert status == 0
    assert len(found) == 3
    assert [one["num_moved"] for one in found if "bfloat16" in one["engine"]] == [0, 0]
    assert all(one["max_difference"] <= 1e-5 for one in found)
