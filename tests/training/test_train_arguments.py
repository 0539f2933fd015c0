"""The mistakes of a ``reward-train`` command line: one sentence each, before any heavy import."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from preference_rows import polite_pairs, write_pairs
from tiny_models import MAX_POSITIONS, write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification

from service.errors import OutputError, SettingsError
from service.transformers_logging import transformers_silenced
from training.arguments import (
    RunOptions,
    argument_parser,
    check_first_rows,
    check_folders,
    check_resumed_run,
    list_checkpoints,
    read_recipe,
    read_run_options,
    write_run_file,
)
from training.processes import Processes, read_processes
from training.recipe import Recipe, check_recipe, resolve_dtype

RUN_ALL = """
import contextlib, io, json, sys
from training.train import main
results = []
for arguments in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
    heavy = [name for name in ("torch", "transformers", "trl", "datasets", "peft") if name in sys.modules]
    results.append([status, errors.getvalue(), output.getvalue(), heavy])
json.dump(results, sys.stdout)
"""
"""Runs ``main`` on every list of arguments in one fresh process, and tells what is imported by then."""

MISTAKES = {
    "two-labels": (1, ["--base", "two"], "two is a classifier with 2 outputs (score.weight)"),
    "adapter-as-base": (1, ["--base", "adapter"], "adapter is a PEFT adapter"),
    "empty-folder-as-base": (1, ["--base", "empty"], "empty has no config.json"),
    "no-such-base": (1, ["--base", "no-base"], "There is no folder no-base, nor is it a hub id"),
    "no-data": (1, ["--data", "missing.jsonl"], "missing.jsonl does not exist"),
    "wrong-columns": (1, ["--data", "columns.jsonl"], "columns.jsonl, row 1"),
    "no-rows": (1, ["--data", "empty.jsonl"], "empty.jsonl has no rows"),
    "wrong-eval": (1, ["--eval", "columns.jsonl"], "columns.jsonl, row 1"),
    "out-is-a-file": (1, ["--out", "pairs.jsonl"], "--out pairs.jsonl is a file"),
    "out-below-a-file": (1, ["--out", "pairs.jsonl/model"], "--out pairs.jsonl/model cannot be written, because"),
    "out-in-proc": (1, ["--out", "/proc/model"], "--out /proc/model cannot be written"),
    "out-has-files": (1, ["--out", "base"], "--out base exists and is not empty"),
    "out-has-the-base": (1, ["--out", "base", "--overwrite"], "--out base holds base, which is read"),
    "out-has-other-files": (1, ["--out", "others", "--overwrite"], "--out others holds no model"),
    "merge-within-out": (1, ["--merge", "out/merged"], "neither within the other"),
    "merge-is-a-file": (1, ["--merge", "pairs.jsonl"], "--merge pairs.jsonl is a file"),
    "merge-of-a-whole-model": (1, ["--merge", "merged", "--full"], "--merge is for adapters"),
    "nothing-to-continue": (1, ["--adapter", "empty"], "--adapter empty holds no adapter"),
    "adapter-of-a-whole-model": (1, ["--adapter", "adapter", "--full"], "--adapter and --full exclude each other"),
    "nothing-to-resume": (1, ["--resume"], "has no complete checkpoint to continue from"),
    "negative-learning-rate": (1, ["--learning-rate", "-1"], "--learning-rate is -1.0"),
    "learning-rate-nan": (1, ["--learning-rate", "nan"], "--learning-rate is nan"),
    "more-layers-than-the-base": (1, ["--lora-layers", "99"], "--lora-layers is 99, but the base has 3 layers"),
    "more-tokens-than-positions": (1, ["--max-length", "100000"], f"but the base has {MAX_POSITIONS} positions"),
    "batch-not-a-multiple": (
        1,
        ["--batch-pairs", "3", "--micro-batch-pairs", "2"],
        "--batch-pairs 3 is not a multiple of --micro-batch-pairs 2",
    ),
    "more-than-all-held-out": (1, ["--hold-out-percent", "150"], "--hold-out-percent is 150.0; it must be from 0"),
    "unknown-contrast": (1, ["--contrast", "1", "--contrast-families", "bears"], "does not know 'bears': use some of"),
    "contrast-without-share": (1, ["--contrast-families", "bare=2"], "--contrast-families needs --contrast"),
    "no-epochs": (1, ["--epochs", "0"], "--epochs is 0.0"),
    "patience-without-eval": (1, ["--patience", "2"], "--patience needs --eval"),
    "unknown-report": (1, ["--report-to", "paper"], "--report-to does not know 'paper'"),
    "not-a-number": (2, ["--lora-rank", "many"], "invalid int value"),
    "unknown-option": (2, ["--learningrate", "1"], "no option --learningrate (did you mean --learning-rate?)"),
    "shortened-option": (2, ["--learn", "1"], "there is no option --learn"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    write_tiny_causal_lm(folder / "base")
    two = write_tiny_checkpoint(folder / "two")
    with transformers_silenced():
        AutoModelForSequenceClassification.from_pretrained(
            two, num_labels=2, ignore_mismatched_sizes=True
        ).save_pretrained(two)
    for name, file in (("adapter", "adapter_config.json"), ("others", "photo.jpeg")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "columns.jsonl").write_text('{"question": "?", "good": "yes", "bad": "no"}\n')
    write_pairs(folder / "pairs.jsonl", polite_pairs(8))
    return folder


def run_all(folder: Path, commands: list[list[str]]) -> list[tuple[int, str, str, list[str]]]:
    finished = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(commands),
        cwd=folder,
        env={"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [(status, errors, output, heavy) for status, errors, output, heavy in json.loads(finished.stdout)]


def test_every_mistake_is_answered_by_one_sentence_before_heavy_imports(folder: Path) -> None:
    """Status, one line that begins with the command's name and says what is wrong, and neither torch nor TRL."""
    usual = ["--data", "pairs.jsonl", "--base", "base", "--out", "out"]

    results = run_all(folder, [[*usual, *arguments] for _, arguments, _ in MISTAKES.values()])

    for (name, (status, _, complaint)), result in zip(MISTAKES.items(), results, strict=True):
        assert result[0] == status, (name, result)
        assert complaint in result[1], name
        assert result[1].startswith("reward-train: "), name
        assert result[1].count("\n") == 1, (name, result)
        assert result[3] == [], name
    assert not (folder / "out").exists()


def test_help_and_version_need_no_heavy_import(folder: Path) -> None:
    """Both are printed without torch and TRL; no option is described twice, and no default is None."""
    (help_status, _, help_text, heavy), (version_status, _, version, _) = run_all(folder, [["--help"], ["--version"]])

    assert (help_status, version_status, heavy) == (0, 0, [])
    assert version.startswith("reward-train ")
    assert "None" not in help_text
    assert "LORA_RANK" not in help_text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "pairs.jsonl", "--base", "org/model"], "org/model is not a local folder, and could not be downl"),
        (["--data", "org/pairs:test", "--base", "base"], "org/pairs:test is not a local file, and there is no such"),
    ],
    ids=["base", "data"],
)
def test_a_hub_that_cannot_be_reached_is_one_sentence(folder: Path, arguments: list[str], complaint: str) -> None:
    """Without a network a base or a data set on the hub is refused at once, not after retries."""
    ((status, errors, _, heavy),) = run_all(folder, [[*arguments, "--out", "out"]])

    assert status == 1
    assert complaint in errors
    assert (errors.count("\n"), heavy) == (1, [])


def test_a_cached_data_set_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library `datasets` has prepared is accepted without a request."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "org___pairs").mkdir()

    check_first_rows(["org/pairs:test"])


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(lora_rank=0),
        Recipe(lora_layers=0),
        Recipe(learning_rate=float("inf")),
        Recipe(warmup_share=1.1),
        Recipe(epochs=float("nan")),
        Recipe(max_length=0),
        Recipe(batch_pairs=0),
        Recipe(micro_batch_pairs=-1),
        Recipe(hold_out_percent=100),
        Recipe(min_support=-0.1),
        Recipe(center_coefficient=-1.0),
        Recipe(patience=0),
        Recipe(eval_steps=0),
        Recipe(eval_pairs=0),
        Recipe(checkpoint_steps=0),
        Recipe(contrast=-0.5),
        Recipe(seed=-1),
    ],
    ids=lambda recipe: next(
        name for name in Recipe.__slots__ if str(getattr(recipe, name)) != str(getattr(Recipe(), name))
    ),
)
def test_every_hyperparameter_has_a_range(recipe: Recipe) -> None:
    """A value outside of it is refused by the option's name; the defaults are inside."""
    check_recipe(Recipe())

    with pytest.raises(SettingsError, match="it must be"):
        check_recipe(recipe)


def test_the_batch_is_divided_among_processes() -> None:
    """A step has as many pairs whatever the number of processes; what cannot be divided is refused."""
    recipe = Recipe(batch_pairs=16, micro_batch_pairs=4)

    assert [recipe.accumulation_steps(count) for count in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(SettingsError, match="not a multiple of --micro-batch-pairs 4 in 3 processes"):
        recipe.accumulation_steps(3)


def test_dtype_auto_depends_on_the_device() -> None:
    """``auto`` is bf16 only with native products; a choice is respected."""
    assert resolve_dtype("auto", native_bfloat16=True) == "bf16"
    assert resolve_dtype("auto", native_bfloat16=False) == "fp32"
    assert resolve_dtype("bf16", native_bfloat16=False) == "bf16"


def test_the_default_length_is_not_above_the_positions_of_the_base() -> None:
    """Without --max-length the limit is 1,024 tokens or the base's positions; a given one is respected."""
    usual = ["--data", "pairs.jsonl", "--out", "out"]
    default, given = argument_parser().parse_args(usual), argument_parser().parse_args([*usual, "--max-length", "600"])

    assert read_recipe(default, max_positions=512).max_length == 512
    assert read_recipe(default, max_positions=4096).max_length == 1024
    assert read_recipe(default).max_length == 1024
    assert read_recipe(given, max_positions=512).max_length == 600


def test_launchers_tell_the_number_of_a_process() -> None:
    """The variables of torchrun are read; without them there is one process."""
    assert read_processes({}) == Processes(0, 0, 1)
    assert read_processes({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Processes(3, 1, 4)
    with pytest.raises(SettingsError, match="must be numbers"):
        read_processes({"RANK": "first"})


def write_checkpoint(out: Path, step: int, *, complete: bool = True) -> None:
    folder = out / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}" if complete else "{")


def test_an_unfinished_run_is_resumed_or_overwritten(tmp_path: Path) -> None:
    """With a complete checkpoint and no manifest the user must choose; without a checkpoint the folder is unused."""
    (tmp_path / "log.jsonl").write_text("{}\n")
    write_checkpoint(tmp_path, 10, complete=False)
    check_folders(tmp_path, [], RunOptions())

    write_checkpoint(tmp_path, 9)

    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9"]
    with pytest.raises(OutputError, match="unfinished run: pass --resume"):
        check_folders(tmp_path, [], RunOptions())
    check_folders(tmp_path, [], RunOptions(resume=True))
    check_folders(tmp_path, [], RunOptions(overwrite=True))


def test_a_run_is_resumed_with_the_weights_that_it_started_with(tmp_path: Path) -> None:
    """Another base or another size of the adapter is refused by the option's name; other options may change."""
    write_run_file(tmp_path, Recipe(lora_rank=8), "org/sft")

    check_resumed_run(tmp_path, Recipe(lora_rank=8, epochs=2, micro_batch_pairs=8), "org/sft")

    for recipe, base, complaint in (
        (Recipe(lora_rank=16), "org/sft", "started with --lora-rank 8, and --lora-rank is now 16"),
        (Recipe(lora_rank=8, lora_layers=2), "org/sft", "started with --lora-layers all"),
        (Recipe(full=True), "org/sft", "started with --full False"),
        (Recipe(lora_rank=8), "org/other", "started with --base org/sft"),
    ):
        with pytest.raises(SettingsError, match=complaint):
            check_resumed_run(tmp_path, recipe, base)


def test_a_finished_model_is_overwritten_on_request_only(tmp_path: Path) -> None:
    """Neither a new run nor a resumed one replaces it without --overwrite."""
    (tmp_path / "training.json").write_text("{}")
    write_checkpoint(tmp_path, 9)

    with pytest.raises(OutputError, match=r"is not empty.*--overwrite"):
        check_folders(tmp_path, [], RunOptions())
    with pytest.raises(OutputError, match="finished model: pass --overwrite"):
        check_folders(tmp_path, [], RunOptions(resume=True))
    check_folders(tmp_path, [], RunOptions(resume=True, overwrite=True))


def test_no_abbreviations_and_no_values_in_uppercase_twice() -> None:
    """Every option with a value has a name for it that is not the option's own."""
    actions = [action for action in argument_parser()._actions if isinstance(action, argparse._StoreAction)]

    assert all(action.metavar or action.choices or action.dest == "base" for action in actions)


def test_a_missing_report_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard and wandb are optional: without their package the command says what to install."""
    usual = ["--data", "pairs.jsonl", "--out", "out"]
    options = argument_parser().parse_args([*usual, "--report-to", "wandb, tensorboard"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(SettingsError, match="needs a package that is not installed: pip install wandb"):
        read_run_options(options)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    assert read_run_options(options).report_to == ("wandb", "tensorboard")
    assert read_run_options(argument_parser().parse_args(usual)).report_to == ()
