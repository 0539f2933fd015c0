"""``reward-train --objectives`` on pairs labelled with two objectives, from rows to a served model and its audit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from http_application import checkpoint_client
from preference_rows import longer_wins_pairs, polite_pairs, write_pairs
from reward_client.provenance import TRAINING_MANIFEST_FILE
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.checkpoints.reward_description import WeightedSum, read_description, write_description
from training import train as reward_train
from training.objective_trainer import OUTPUT_COLUMN, ObjectiveTrainer
from training.objectives import describe_outputs
from training.recipe import Recipe
from training.reward_model import load_base
from training.tensor_loss import reward_model_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

OBJECTIVES = ("politeness", "length")
WEIGHTS = (0.5, 2.0)


def labelled(rows: list[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    return [row | {"objective": objective} for row in rows]


def two_objectives(num_pairs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of both objectives in turn: the polite answer, and the longer one."""
    polite = labelled(polite_pairs(num_pairs, seed), "politeness")
    longer = labelled(longer_wins_pairs(num_pairs, seed + 100), "length")
    return [row for pair in zip(polite, longer, strict=True) for row in pair]


@dataclass(frozen=True)
class Run:
    folder: Path
    merged: Path
    dev: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that the command trained on two objectives with weights, merged into a plain checkpoint."""
    folder = tmp_path_factory.mktemp("objectives")
    write_tiny_causal_lm(folder / "base")
    data = write_pairs(folder / "train.jsonl", two_objectives(120))
    dev = write_pairs(folder / "dev.jsonl", two_objectives(40, seed=1))
    named = [f"{name}={weight}" for name, weight in zip(OBJECTIVES, WEIGHTS, strict=True)]
    options = ["--data", data, "--eval", dev, "--base", folder / "base", "--out", folder / "out"]
    options += ["--merge", folder / "merged", "--dtype", "fp32", "--batch-pairs", 8, "--max-length", 128]
    options += ["--epochs", 2, "--learning-rate", 0.01, "--lora-rank", 8]
    assert reward_train.main([*map(str, options), "--objectives", *named]) == 0
    return Run(folder / "out", folder / "merged", dev)


@pytest.mark.slow
def test_each_output_learns_its_objective(run: Run) -> None:
    """On unseen prompts each output agrees with the pairs of its own objective, as the manifest reports for each."""
    evaluations = json.loads((run.folder / TRAINING_MANIFEST_FILE).read_text())["evaluations"]

    assert set(evaluations) == {f"dev.jsonl, {name}" for name in OBJECTIVES}
    assert all(found["num_pairs"] == 40 and found["accuracy"]["value"] > 0.9 for found in evaluations.values())


@pytest.mark.slow
def test_the_description_has_names_and_weights(run: Run) -> None:
    """Adapter and merged checkpoint describe the outputs and the weights of the reward."""
    for folder in (run.folder, run.merged):
        description = read_description(folder)
        assert description is not None
        assert description.outputs == OBJECTIVES
        assert description.combine == WeightedSum(dict(zip(OBJECTIVES, WEIGHTS, strict=True)))


@pytest.mark.slow
async def test_the_model_is_served_with_both_rewards(run: Run) -> None:
    """Over HTTP both named rewards are those of plain transformers on the merged checkpoint, beside their sum."""
    rows = [json.loads(line) for line in run.dev.read_text().splitlines()][:6]
    items = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    plain = AutoModelForSequenceClassification.from_pretrained(run.merged, dtype=torch.float32)

    async with checkpoint_client(run.merged) as client:
        results = (await client.post("/v1/score", json={"items": items})).json()["results"]

    for item, result in zip(items, results, strict=True):
        turns = [*item["prompt"], {"role": "assistant", "content": item["completion"]}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.inference_mode():
            expected = plain(ids).logits[0].tolist()
        assert list(result["rewards"].values()) == pytest.approx(expected, abs=1e-4)
        assert list(result["rewards"]) == list(OBJECTIVES)
        weighted = sum(weight * value for weight, value in zip(WEIGHTS, result["rewards"].values(), strict=True))
        assert result["reward"] == pytest.approx(weighted, abs=1e-12)


def test_the_loss_of_a_pair_is_that_of_its_output() -> None:
    """The trainer's loss is the Bradley-Terry loss of each pair's own output; the other output has no gradient."""
    logits = torch.tensor([[1.0, 5.0], [2.0, -1.0], [0.5, 3.0], [9.0, 0.5]], requires_grad=True)
    inputs = {
        OUTPUT_COLUMN: torch.tensor([0, 1]),
        "input_ids": torch.zeros(4, 1, dtype=torch.long),
        "attention_mask": torch.ones(4, 1),
    }
    trainer = object.__new__(ObjectiveTrainer)
    trainer.__dict__ |= _trainer_state()

    loss = trainer.compute_loss(lambda **_: _Answer(logits), inputs)
    loss.backward()

    chosen, rejected = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])
    assert loss.item() == pytest.approx(reward_model_loss(chosen, rejected).item(), abs=1e-6)
    assert logits.grad is not None
    assert logits.grad[[0, 2], 1].abs().sum() == 0
    assert logits.grad[[1, 3], 0].abs().sum() == 0
    assert OUTPUT_COLUMN in inputs


class _Answer:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class _OneProcess:
    def gather(self, values: Any) -> Any:
        return values

    gather_for_metrics = gather


def _trainer_state() -> dict[str, Any]:
    """What TRL's loss reads of its trainer."""
    from collections import defaultdict
    from types import SimpleNamespace

    return {
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(center_rewards_coefficient=None),
        "accelerator": _OneProcess(),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }


@pytest.mark.parametrize(
    ("rows", "names", "complaint"),
    [
        (polite_pairs(8), ["a", "b"], 'has no "objective"'),
        (labelled(polite_pairs(8), "c"), ["a", "b"], "that --objectives does not name"),
        (labelled(polite_pairs(40), "a"), ["a", "b"], "No pair is left to train the objective b on"),
        (labelled(polite_pairs(8), "a"), ["a"], "name two or more outputs"),
        (labelled(polite_pairs(8), "a"), ["a", "b", "a"], "a name twice"),
        (labelled(polite_pairs(8), "a"), ["a=1", "b"], "weights for some of the names only"),
        ([*polite_pairs(8)[:1], polite_pairs(1)[0] | {"objective": 3}], ["a", "b"], '"objective" must be the name'),
    ],
)
def test_mistakes_are_one_sentence(
    rows: list[dict[str, Any]], names: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows and names that do not fit each other end the command with a sentence that says so."""
    write_tiny_causal_lm(tmp_path / "base")
    data = write_pairs(tmp_path / "pairs.jsonl", rows)
    command = ["--data", str(data), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--dtype", "fp32"]

    assert reward_train.main([*command, "--max-length", "128", "--objectives", *names]) == 1

    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out" / "reward_model.json").exists()


def test_a_base_with_other_outputs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base with one output, or with outputs of other names, is not trained further as if it had these objectives."""
    data = write_pairs(tmp_path / "pairs.jsonl", two_objectives(4))
    command = ["--data", str(data), "--out", str(tmp_path / "out"), "--objectives", *OBJECTIVES]
    one = write_tiny_checkpoint(tmp_path / "one")
    assert reward_train.main([*command, "--base", str(one)]) == 1
    assert "--objectives names 2" in capsys.readouterr().err

    recipe = Recipe(objectives=("x", "y"), dtype="fp32", max_length=128)
    model, tokenizer = load_base(write_tiny_causal_lm(tmp_path / "causal"), recipe)
    model.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    write_description(tmp_path / "two", describe_outputs(recipe))
    assert reward_train.main([*command, "--base", str(tmp_path / "two")]) == 1
    assert "give --objectives these names" in capsys.readouterr().err
