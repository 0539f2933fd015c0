"""A gated model and an ensemble, served without Ray: what their answers hold, and what the service says of them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import httpx2
import pytest
from reward_client import RewardClient
from safetensors.torch import save_file
from serving import serving
from several_outputs import PAIRS, scores_of, served
from tiny_layouts import HIDDEN_SIZE, random, store_armo_rm
from tiny_models import write_tiny_checkpoint

from export.convert import convert
from service.checkpoints.reward_description import LowerBound

pytestmark = pytest.mark.slow

OPTIONS = ("--model.device", "cpu", "--model.dtype", "float32", "--model.num_threads", "1")
ITEMS = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]


def results_of(url: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answer = httpx2.post(f"{url}/v1/score", json={"items": items}, timeout=60)
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


def test_a_gated_model_is_served(tmp_path: Path) -> None:
    """Each result has the gated sum and the objectives, alone and together; an item without a prompt is an error."""
    store_armo_rm(tmp_path / "source")
    pattern = "<|im_end|>\n<|im_start|>assistant\n"
    convert(tmp_path / "source", tmp_path / "out", outputs=("helpful", "correct", "brief"), gate_pattern=pattern)
    expected = [score.outputs for score in scores_of(served(tmp_path / "out"), PAIRS)]

    with serving(tmp_path, "--model", str(tmp_path / "out"), *OPTIONS, runtime="local") as server:
        together = results_of(server.url, [*ITEMS, {"text": "no prompt"}])
        alone = [results_of(server.url, [item])[0] for item in ITEMS[::-1]][::-1]
        described = httpx2.get(f"{server.url}/v1/model").json()

    assert together[-1]["error"]["code"] == "invalid_request"
    for one, other, outputs in zip(together[:-1], alone, expected, strict=True):
        assert list(one["rewards"].values()) == pytest.approx(outputs, abs=1e-4)
        assert one["reward"] == one["rewards"]["reward"]
        assert other["rewards"] == pytest.approx(one["rewards"], abs=1e-5)
    assert described["reward_model"]["head"]["kind"] == "gated"
    assert described["engine"]["outputs"] == ["reward", "helpful", "correct", "brief"]


def test_an_ensemble_is_served(tmp_path: Path) -> None:
    """Results have the members, their deviation and the lower bound; the client has them as fields."""
    write_tiny_checkpoint(tmp_path / "source")
    save_file({"weight": random(2, HIDDEN_SIZE)}, tmp_path / "heads.safetensors")
    convert(tmp_path / "source", tmp_path / "out", members=(tmp_path / "heads.safetensors",), combine=LowerBound(2.0))

    with serving(tmp_path, "--model", str(tmp_path / "out"), *OPTIONS, runtime="local") as server:
        results = results_of(server.url, ITEMS)
        with RewardClient(server.url) as client:
            scored = client.score_items(ITEMS)

    for result, item in zip(results, scored, strict=True):
        members = result["reward_members"]
        assert len(members) == 3
        assert result["reward_std"] == pytest.approx(statistics.pstdev(members))
        assert result["reward"] == pytest.approx(statistics.fmean(members) - 2 * result["reward_std"])
        assert list(item.reward_members) == pytest.approx(members, abs=1e-5)
        assert item.reward_std == pytest.approx(result["reward_std"], abs=1e-5)
