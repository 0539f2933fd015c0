"""``reward-train`` from files to a served folder: TRL's trainer, a tiny model and a rule that it can learn."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from http_application import checkpoint_client
from peft import PeftModel
from preference_rows import polite_pairs, with_slips, write_pairs
from reward_client.hashing import file_sha256
from reward_client.provenance import TRAINING_MANIFEST_FILE, Origin, base_hash, read_origin
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.checkpoints.adapter import merge_adapter
from service.data.holdout import is_held_out
from service.errors import CheckpointError, SettingsError
from service.records import Message
from training import train as reward_train
from training.arguments import RunOptions, check_folders, list_checkpoints
from training.evaluation import Share, evaluate, rewards
from training.manifest import Manifest
from training.pairs import TokenizedPair, tokenize_pairs
from training.preferences import read_pairs
from training.progress import ProgressCallback
from training.recipe import Recipe
from training.reward_model import load_base, lora_config, reward_head
from training.train import train
from training.trainer import _trainer_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
"""PEFT, with which tests load adapters, uses deprecated names of transformers."""

RECIPE = Recipe(
    lora_rank=8,
    learning_rate=1e-2,
    epochs=2,
    max_length=128,
    batch_pairs=8,
    micro_batch_pairs=4,
    hold_out_percent=25,
    dtype="fp32",
    eval_steps=20,
    eval_pairs=8,
)


NUM_PAIRS = 320


@dataclass(frozen=True)
class Run:
    """A completed training run, shared by several tests."""

    base: Path
    out: Path
    manifest: Manifest
    held_out: list[TokenizedPair]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    base = write_tiny_causal_lm(folder / "base")
    data = write_pairs(folder / "train.jsonl", polite_pairs(NUM_PAIRS))
    watched = write_pairs(folder / "dev.jsonl", with_slips(polite_pairs(40, seed=1), every=5))
    manifest = train([data], str(base), folder / "out", RECIPE, [watched], RunOptions(keep_checkpoints=True))
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = [pair for pair in read_pairs([data]) if is_held_out(pair.prompt)]
    return Run(base, folder / "out", manifest, tokenize_pairs(held_out, tokenizer))


def adapted_model(run: Run) -> PeftModel:
    base = AutoModelForSequenceClassification.from_pretrained(run.base, num_labels=1, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run.out).eval()


def test_accuracy_on_unseen_prompts_goes_up(run: Run) -> None:
    """Accuracy on held-out pairs rises from one half (a head of zeros gives ties) to nearly 1."""
    untrained, _ = load_base(run.base, RECIPE)

    before, after = evaluate(untrained, run.held_out), evaluate(adapted_model(run), run.held_out)

    assert before.accuracy.value == 0.5
    assert after.accuracy.value > 0.9
    assert run.manifest.evaluations["dev.jsonl"].accuracy.value > 0.7


def test_the_adapter_has_a_trained_head(run: Run) -> None:
    """The head is in the adapter's file, has one output and is not zero."""
    tensors = load_file(run.out / "adapter_model.safetensors")

    (head,) = [tensor for name, tensor in tensors.items() if "lora" not in name]

    assert head.shape[0] == 1
    assert head.abs().sum() > 0


def test_the_merged_checkpoint_gives_the_same_rewards(run: Run, tmp_path: Path) -> None:
    """The rewards of the merged checkpoint are those of the trained model, within 1e-4 in fp32."""
    sequences = [pair.chosen_ids for pair in run.held_out] + [pair.rejected_ids for pair in run.held_out]
    expected = rewards(adapted_model(run), sequences)

    merged = AutoModelForSequenceClassification.from_pretrained(merge_adapter(run.out, tmp_path / "merged"))

    assert rewards(merged, sequences).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.std() > 0.1


async def test_the_served_checkpoint_has_the_accuracy_of_the_manifest(run: Run, tmp_path: Path) -> None:
    """The trained checkpoint passes the service's validation, and its accuracy over HTTP is that of the manifest."""
    merged = merge_adapter(run.out, tmp_path / "merged")
    pairs = list(read_pairs([run.base.parent / "dev.jsonl"]))
    items = [
        {"prompt": [turn.as_dict() for turn in pair.prompt if isinstance(turn, Message)], "completion": completion}
        for pair in pairs
        for completion in (pair.chosen, pair.rejected)
    ]

    async with checkpoint_client(merged) as client:
        answer = await client.post("/v1/score", json={"items": items})
        model = (await client.get("/v1/model", params={"reference": str(run.base.name)})).json()

    rewards_over_http = [result["reward"] for result in answer.json()["results"]]
    margins = [c - r for c, r in zip(rewards_over_http[::2], rewards_over_http[1::2], strict=True)]
    evaluation = run.manifest.evaluations["dev.jsonl"]
    assert Share.of(margins).value == evaluation.accuracy.value
    assert sum(margins) / len(margins) == pytest.approx(evaluation.mean_margin, abs=1e-3)
    assert model["reference"]["same"] is True


def test_held_out_prompts_were_never_trained_on(run: Run) -> None:
    """The counts add up, and the trainer made as many steps as the allowed pairs need."""
    counts = run.manifest.pairs
    assert counts.held_out == len(run.held_out) > 0
    assert counts.trained == NUM_PAIRS - counts.held_out

    last = json.loads((run.out / "checkpoints" / latest_checkpoint(run) / "trainer_state.json").read_text())

    assert last["max_steps"] == RECIPE.epochs * -(-counts.trained // RECIPE.batch_pairs)


def latest_checkpoint(run: Run) -> str:
    return max((path.name for path in (run.out / "checkpoints").glob("checkpoint-*")), key=lambda name: int(name[11:]))


def test_the_manifest_records_the_run(run: Run) -> None:
    """It has base, data and libraries with hashes or versions, and the whole recipe."""
    written = json.loads((run.out / TRAINING_MANIFEST_FILE).read_text())

    assert written["recipe"]["learning_rate"] == RECIPE.learning_rate
    assert len(written["base_hash"]) == 64
    assert list(written["data_hashes"]) == ["train.jsonl"]
    assert written["libraries"]["trl"]
    assert written["evaluations"]["dev.jsonl"]["num_pairs"] == 40
    assert read_origin(run.out) == Origin(run.base.name, base_hash(run.base))


def test_the_log_has_the_loss_of_every_tenth_step(run: Run) -> None:
    """The log is in JSON lines, and the loss falls."""
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]

    losses = [line["loss"] for line in lines if "loss" in line]

    assert losses[-1] < losses[0]
    assert any("eval_accuracy" in line for line in lines)


def test_training_stops_on_a_plateau(tmp_path: Path) -> None:
    """On random labels training stops early and selects the weights of the step with the lowest loss."""
    base = write_tiny_causal_lm(tmp_path / "base")
    random_labels = with_slips(polite_pairs(64), every=2)
    data = write_pairs(tmp_path / "pairs.jsonl", random_labels)
    watched = write_pairs(tmp_path / "dev.jsonl", with_slips(polite_pairs(16, seed=1), every=2))
    recipe = replace(RECIPE, hold_out_percent=0, epochs=8, eval_steps=2, eval_pairs=16, patience=2, full=True)

    manifest = train([data], str(base), tmp_path / "out", recipe, [watched], RunOptions(keep_checkpoints=True))

    losses = {
        line["step"]: line["eval_loss"]
        for line in map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
        if "eval_loss" in line
    }
    assert manifest.num_steps < 64
    assert manifest.selected_step == min(losses, key=losses.__getitem__)
    selected = load_file(
        tmp_path / "out" / "checkpoints" / f"checkpoint-{manifest.selected_step}" / "model.safetensors"
    )
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["score.weight"], selected["score.weight"])


def test_early_stopping_needs_evaluation_pairs(tmp_path: Path) -> None:
    """Without them it is refused before anything is loaded."""
    with pytest.raises(SettingsError, match="--patience needs --eval"):
        train(["pairs.jsonl"], "no/base", tmp_path / "out", Recipe(patience=1))


def test_the_recipe_reaches_the_trainer(tmp_path: Path) -> None:
    """Centring, gradient accumulation per process and the reports are in TRL's settings."""
    recipe = Recipe(center_coefficient=0.01, batch_pairs=32, micro_batch_pairs=4)

    settings = _trainer_settings(
        recipe, num_pairs=320, evaluates=False, out_dir=tmp_path, num_processes=2, report_to=["tensorboard", "wandb"]
    )

    assert settings.center_rewards_coefficient == 0.01
    assert settings.gradient_accumulation_steps == 4
    assert settings.report_to == ["tensorboard", "wandb"]


def test_only_the_topmost_layers_are_adapted(tmp_path: Path) -> None:
    """With ``lora_layers`` the layers below are not adapted, and the head is never a LoRA target."""
    model, _ = load_base(write_tiny_causal_lm(tmp_path), RECIPE)

    config = lora_config(model, Recipe(lora_layers=2))

    assert config.layers_to_transform == [1, 2]
    assert "score" not in config.target_modules
    assert {"q_proj", "down_proj"} <= set(config.target_modules)


def test_the_head_of_a_reward_model_is_retained(tmp_path: Path) -> None:
    """Training from a reward model starts at its rewards; only a missing head starts at zero."""
    _, fresh = reward_head(load_base(write_tiny_causal_lm(tmp_path / "causal"), RECIPE)[0])
    _, retained = reward_head(load_base(write_tiny_checkpoint(tmp_path / "reward"), RECIPE)[0])

    assert fresh.weight.abs().sum() == 0
    assert retained.weight.abs().sum() > 0


def test_an_adapter_is_refused_where_the_base_lacks_more_than_a_head(tmp_path: Path) -> None:
    """Weights that transformers would initialise randomly are not in an adapter, so all weights must be trained."""
    folder = write_tiny_causal_lm(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight.*--full"):
        load_base(folder, RECIPE)


def test_the_command_trains_all_weights_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--full`` writes a whole checkpoint with its head, and the accuracy is printed."""
    base = write_tiny_causal_lm(tmp_path / "base")
    data = write_pairs(tmp_path / "pairs.jsonl", polite_pairs(16))
    command = ["--data", str(data), "--base", str(base), "--out", str(tmp_path / "out"), "--eval", str(data)]

    status = reward_train.main([*command, "--full", "--dtype", "fp32", "--max-length", "128"])

    assert status == 0
    assert "pairs.jsonl: accuracy" in capsys.readouterr().err
    assert load_file(tmp_path / "out" / "model.safetensors")["score.weight"].shape[0] == 1


def test_the_command_merges_on_request(tmp_path: Path) -> None:
    """``--merge`` writes a plain checkpoint in addition to the adapter."""
    base = write_tiny_causal_lm(tmp_path / "base")
    data = write_pairs(tmp_path / "pairs.jsonl", polite_pairs(16))
    command = ["--data", str(data), "--base", str(base), "--out", str(tmp_path / "out"), "--dtype", "fp32"]

    status = reward_train.main([*command, "--max-length", "128", "--merge", str(tmp_path / "merged")])

    assert status == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--data", "pairs.jsonl", "--base", "no/such/model/here"], "no folder no/such/model/here, nor is it a hub id"),
        (["--data", "pairs.jsonl", "--max-length", "3"], "No pair is left to train on"),
        (["--data", "pairs.jsonl", "--full", "--merge", "merged"], "--merge is for adapters"),
    ],
    ids=["no-data", "no-base", "nothing-left", "merge-of-nothing"],
)
def test_an_error_ends_the_command_with_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    """The exit status is 1, one sentence is printed, and no output folder is created."""
    monkeypatch.chdir(tmp_path)
    base = write_tiny_causal_lm(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl", polite_pairs(8))

    status = reward_train.main(["--base", str(base), "--out", "out", *arguments])

    assert status == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def small_run(folder: Path, *arguments: str) -> list[str]:
    """A command line that trains on 32 pairs in four steps, within ``folder``."""
    if not (folder / "base").exists():
        write_tiny_causal_lm(folder / "base")
        write_pairs(folder / "pairs.jsonl", polite_pairs(32))
    usual = ["--data", str(folder / "pairs.jsonl"), "--base", str(folder / "base"), "--out", str(folder / "out")]
    return [*usual, "--dtype", "fp32", "--batch-pairs", "8", "--max-length", "128", *arguments]


def test_a_finished_folder_has_the_model_its_card_and_no_leftovers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the model's files, manifest, card and log stay; the output has neither bars nor raw dictionaries."""
    status = reward_train.main(small_run(tmp_path))

    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "log.jsonl",
        "reward_model.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "step 1/" in shown.err
    assert not any(sign in shown.err for sign in ("Warning", "{", "it/s", "%|"))


def test_held_out_pairs_are_evaluated_where_no_others_are_given(tmp_path: Path) -> None:
    """Manifest and model card have the accuracy on pairs that were not trained on, beside the length rule."""
    assert reward_train.main(small_run(tmp_path)) == 0

    manifest = json.loads((tmp_path / "out" / TRAINING_MANIFEST_FILE).read_text())
    result = manifest["evaluations"]["held-out pairs"]
    assert result["num_pairs"] == manifest["pairs"]["held_out"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| held-out pairs | {result['num_pairs']} | {result['accuracy']['value']:.1%} ±" in card
    assert f"| {result['longer_wins']['value']:.1%} ±" in card
    assert manifest["data_hashes"]["pairs.jsonl"] in card
    assert f"| trained on | {manifest['pairs']['trained']} |" in card


def test_contrast_pairs_are_trained_on_beside_the_data(tmp_path: Path) -> None:
    """They make more steps; manifest and card have their number by family; the pairs that were read do not change."""
    options = ["--hold-out-percent", "0", "--contrast", "0.5", "--contrast-families", "insulted", "repeated=3"]

    assert reward_train.main(small_run(tmp_path, *options)) == 0

    manifest = json.loads((tmp_path / "out" / TRAINING_MANIFEST_FILE).read_text())
    made = manifest["contrast_pairs"]
    assert made["insulted"] == 4
    assert 4 < made["repeated"] <= 12
    assert manifest["pairs"]["trained"] == 32
    assert manifest["num_steps"] == -(-(32 + sum(made.values())) // 8)
    assert "| contrast pairs made from those trained on, insulted | 4 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_training_of_an_adapter_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--adapter`` a run starts from its weights and head, records its hash and refuses another rank."""
    assert reward_train.main(small_run(tmp_path)) == 0
    first = (tmp_path / "out").rename(tmp_path / "first")
    options = ["--adapter", str(first), "--learning-rate", "1e-12"]

    assert reward_train.main(small_run(tmp_path, *options)) == 0
    assert reward_train.main(small_run(tmp_path, *options, "--overwrite", "--lora-rank", "4")) == 1

    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    manifest = json.loads((tmp_path / "out" / TRAINING_MANIFEST_FILE).read_text())
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, tmp_path / "out")]
    assert configs[0]["modules_to_save"] == configs[1]["modules_to_save"]
    assert manifest["adapter_hash"] == file_sha256(first / "adapter_model.safetensors")
    assert "give --lora-rank and --lora-layers the same values" in capsys.readouterr().err


def test_an_interrupted_run_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C between two checkpoints --resume gives the weights of a run that was never interrupted."""
    assert reward_train.main(small_run(tmp_path, "--checkpoint-steps", "1")) == 0
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    take_step = ProgressCallback.on_step_end

    def interrupt(self: ProgressCallback, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        take_step(self, args, state, control, **rest)

    monkeypatch.setattr(ProgressCallback, "on_step_end", interrupt)
    assert reward_train.main(small_run(tmp_path, "--checkpoint-steps", "1", "--overwrite")) == 130
    monkeypatch.undo()
    assert not (tmp_path / "out" / TRAINING_MANIFEST_FILE).exists()

    assert reward_train.main(small_run(tmp_path, "--checkpoint-steps", "1", "--resume")) == 0

    resumed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.fixture
def files_of_at_most_50_kb() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """A checkpoint that cannot be written ends the command with the reason; the incomplete one is not resumed from."""
    command = small_run(tmp_path, "--checkpoint-steps", "1")
    request.getfixturevalue("files_of_at_most_50_kb")

    status = reward_train.main(command)

    assert status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"reward-train: {tmp_path / 'out'} cannot be written: the file would be larger")
    assert list_checkpoints(tmp_path / "out") == []


def test_a_diverging_run_writes_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that is not finite ends the command with one sentence, and the folder can be used again."""
    status = reward_train.main(small_run(tmp_path, "--learning-rate", "1e30", "--center-coefficient", "1"))

    assert status == 1
    assert "so the weights are useless" in capsys.readouterr().err
    assert not (tmp_path / "out" / TRAINING_MANIFEST_FILE).exists()
    check_folders(tmp_path / "out", [], RunOptions())


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path: Path) -> None:
    """Under accelerate's launcher the steps have as many pairs; one process writes and prints, and both end."""
    assert reward_train.main(small_run(tmp_path, "--micro-batch-pairs", "2")) == 0
    alone = json.loads((tmp_path / "out" / TRAINING_MANIFEST_FILE).read_text())

    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    module = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "training.train"]
    finished = subprocess.run(
        [*launcher, *module, *small_run(tmp_path, "--micro-batch-pairs", "2", "--overwrite")],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )

    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("Trained on") == 1
    together = json.loads((tmp_path / "out" / TRAINING_MANIFEST_FILE).read_text())
    assert together["num_steps"] == alone["num_steps"]
    assert together["pairs"] == alone["pairs"]
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == alone["num_steps"] + 1


def test_a_base_with_other_shapes_than_its_configuration_is_refused(tmp_path: Path) -> None:
    """Transformers would leave such weights random; the message names the tensor and both shapes."""
    folder = write_tiny_causal_lm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))

    with pytest.raises(CheckpointError, match=r"mlp\..*_proj\.weight of .* has the shape \[.*96.*describes \[.*128"):
        load_base(folder, RECIPE)


def test_the_hyperparameters_must_fit_the_base(tmp_path: Path) -> None:
    """More layers or positions than the loaded model has are refused by the option's name."""
    folder = write_tiny_causal_lm(tmp_path)

    with pytest.raises(SettingsError, match="--lora-layers is 4, but the base has 3 layers"):
        load_base(folder, replace(RECIPE, lora_layers=4))
    with pytest.raises(SettingsError, match=r"--max-length is 1,024, but the base has 512 positions"):
        load_base(folder, replace(RECIPE, max_length=1024))
