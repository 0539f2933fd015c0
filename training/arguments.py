"""The command line of ``reward-train``, and the checks of all that can be checked without a model.

Only small modules are imported, so ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_client.provenance import TRAINING_MANIFEST_FILE

from service.arguments import CommandParser
from service.errors import DatasetError, OutputError, SettingsError
from service.outputs import check_output_folder
from training.contrast import FAMILIES
from training.hub_datasets import check_hub_dataset
from training.objective_argument import parse_family, parse_objective
from training.preferences import read_pairs
from training.recipe import DtypeChoice, Recipe
from training.sources import Source, is_on_hub

CHECKPOINTS_FOLDER = "checkpoints"
"""Within the model's folder; removed after success unless requested."""

RUN_FILE = "run.json"
"""Within the checkpoints: the options that a resumed run must have in common with them."""

TRAINER_STATE_FILE = "trainer_state.json"

REPORT_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Where metrics can be reported to, with the packages of which one is needed."""

LOG_FILE = "log.jsonl"
"""The metrics of the run, one JSON object a line."""

TENSORBOARD_FOLDER = "tensorboard"
LEFTOVERS = frozenset({CHECKPOINTS_FOLDER, LOG_FILE, TENSORBOARD_FOLDER})
"""What a run leaves that ended before its first checkpoint; the next one replaces it."""

_MODEL_FILES = LEFTOVERS | {TRAINING_MANIFEST_FILE, "config.json", "adapter_config.json"}
"""A folder with one of these holds a model or an unfinished run."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run does besides training: none of it changes the model."""

    resume: bool = False
    """Continue from the last checkpoint in the output folder."""

    overwrite: bool = False
    """Replace a model, or an unfinished run, in the output folder."""

    keep_checkpoints: bool = False
    """Leave the checkpoints in the output folder after success."""

    report_to: tuple[str, ...] = ()
    """Where metrics are reported to besides ``log.jsonl``: ``tensorboard``, ``wandb``."""

    merged_dir: Path | None = None
    """Also write adapter and base, merged into a plain checkpoint, to this folder."""


def read_recipe(options: argparse.Namespace, max_positions: int | None = None) -> Recipe:
    """Return the recipe of the command line; the default of ``--max-length`` is not above the base's positions."""
    values: dict[str, Any] = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Recipe)}
    values["objectives"] = tuple(name for name, _ in options.objectives)
    values["objective_weights"] = tuple(weight for _, weight in options.objectives if weight is not None)
    families = options.contrast_families
    values["contrast_families"] = tuple(name for name, _ in families)
    values["contrast_weights"] = tuple(1.0 if weight is None else weight for _, weight in families)
    if values["max_length"] is None:
        values["max_length"] = min(_DEFAULT.max_length, max_positions or _DEFAULT.max_length)
    return Recipe(**values)


def read_run_options(options: argparse.Namespace) -> RunOptions:
    """Return what the command line says about the run.

    Raises:
        SettingsError: ``--report-to`` names something else than TensorBoard and wandb, or their package is missing.
    """
    names = [name.strip() for name in options.report_to.split(",") if name.strip() not in {"", "none"}]
    for name in names:
        if name not in REPORT_PACKAGES:
            raise SettingsError(f"--report-to does not know {name!r}: use {', '.join(REPORT_PACKAGES)} or none.")
        if not any(importlib.util.find_spec(package) for package in REPORT_PACKAGES[name]):
            raise SettingsError(
                f"--report-to {name} needs a package that is not installed: pip install {name} (in the extra report)."
            )
    return RunOptions(
        resume=options.resume,
        overwrite=options.overwrite,
        keep_checkpoints=options.keep_checkpoints,
        report_to=tuple(dict.fromkeys(names)),
        merged_dir=options.merge,
    )


def check_folders(out: Path, inputs: Sequence[Source], run: RunOptions) -> None:
    """Check the folders that are written: they can be, and nothing is overwritten unless that is requested.

    Args:
        out: ``--out``.
        inputs: base and data, which must not be replaced.
        run: the options on resuming, overwriting and merging.

    Raises:
        OutputError: a folder cannot be written, or has files that would be replaced; names the option.
        SettingsError: there is nothing to resume from.
    """
    merged = run.merged_dir
    check_output_folder(out, option="--out", overwrite=True)
    if run.resume and not list_checkpoints(out):
        raise SettingsError(
            f"--resume: {out / CHECKPOINTS_FOLDER} has no complete checkpoint to continue from; leave it out."
        )
    if not run.overwrite:
        _check_unused(out, run)
    if merged is not None:
        check_output_folder(merged, option="--merge", overwrite=run.overwrite)
        if _contains(out, merged) or _contains(merged, out):
            raise OutputError(f"--merge {merged} and --out {out} must be two folders, neither within the other.")
    if run.overwrite:
        for option, folder in (("--out", out), ("--merge", merged)):
            if folder is not None:
                _check_replaceable(folder, option, inputs)


def _check_unused(out: Path, run: RunOptions) -> None:
    is_finished = (out / TRAINING_MANIFEST_FILE).is_file()
    if run.resume and not is_finished:
        return
    if run.resume:
        raise OutputError(f"--out {out} holds a finished model: pass --overwrite to continue its training.")
    if not is_finished and list_checkpoints(out):
        raise OutputError(
            f"--out {out} holds an unfinished run: pass --resume to continue it, or --overwrite to start again."
        )
    if not set(_names(out)) <= LEFTOVERS:
        check_output_folder(out, option="--out")


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _check_replaceable(folder: Path, option: str, inputs: Sequence[Source]) -> None:
    if not _names(folder):
        return
    if not set(_names(folder)) & _MODEL_FILES:
        raise OutputError(f"{option} {folder} holds no model, and --overwrite replaces nothing else: choose another.")
    for source in inputs:
        if Path(source).exists() and _contains(folder, Path(source)):
            raise OutputError(f"{option} {folder} holds {source}, which is read: choose another folder.")


def _contains(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def list_checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run in its output folder, oldest first.

    The trainer's state is the file that is written last; a checkpoint without it was interrupted.
    """
    folders = [
        path
        for path in (out / CHECKPOINTS_FOLDER).glob("checkpoint-*")
        if path.name[11:].isdigit() and _is_json(path / TRAINER_STATE_FILE)
    ]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def write_run_file(out: Path, recipe: Recipe, base: str) -> None:
    """Record beside the checkpoints what a resumed run must have in common with this one."""
    folder = out / CHECKPOINTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps(_fixed_options(recipe, base)) + "\n", encoding="utf-8")


def check_resumed_run(out: Path, recipe: Recipe, base: str) -> None:
    """Check that a run which is resumed has the weights that it started with: the same base, and an adapter as large.

    Raises:
        SettingsError: an option differs; names it with the value that the checkpoints have.
    """
    try:
        started = json.loads((out / CHECKPOINTS_FOLDER / RUN_FILE).read_bytes())
    except (OSError, ValueError):
        return  # checkpoints of an older version; the trainer compares the weights itself
    for option, value in _fixed_options(recipe, base).items():
        if started.get(option) != value:
            raise SettingsError(
                f"--resume: the run in {out} was started with {option} {started.get(option)}, and {option} is now "
                f"{value}: use the same, or pass --overwrite without --resume to start again."
            )


def _fixed_options(recipe: Recipe, base: str) -> dict[str, str]:
    folder = Path(base).expanduser()
    name = folder.resolve() if folder.is_dir() else base
    values = {"--base": name, "--full": recipe.full} | ({} if recipe.full else _adapter_options(recipe))
    if recipe.objectives:
        values["--objectives"] = " ".join(recipe.objectives)
    return {option: str(value) for option, value in values.items()}


def _adapter_options(recipe: Recipe) -> dict[str, object]:
    return {"--lora-rank": recipe.lora_rank, "--lora-layers": recipe.lora_layers or "all"}


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def check_first_rows(sources: Sequence[Source]) -> None:
    """Read the first pair of every local source, so that a wrong file or column is found before a model is loaded.

    Of a data set on the hub only its existence is checked.

    Raises:
        DatasetError: a source is missing or empty, or its first row is not a pair.
    """
    for source in sources:
        if is_on_hub(source):
            check_hub_dataset(str(source))
        elif next(iter(read_pairs([source])), None) is None:
            raise DatasetError(f"{source} has no rows.")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing: None, an empty list, or a flag that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


def argument_parser() -> CommandParser:
    """Return the parser of ``reward-train``."""
    parser = CommandParser(
        prog="reward-train",
        description="Train a scalar-head reward model on preference pairs (prompt, chosen, rejected).",
        formatter_class=_Defaults,
    )
    sources = "files, folders of them, or data sets on the hub (owner/name or owner/name:split)"
    add = parser.add_argument_group("the model and its data").add_argument
    add("--data", nargs="+", required=True, metavar="SOURCE", help=f"pairs to train on: {sources}")
    add("--base", default="demo", help="SFT or instruct checkpoint: a folder, a hub id, or 'demo'")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the model: new, or empty")
    add("--merge", type=Path, metavar="DIR", help="also merge adapter and base into a plain checkpoint folder")
    add(
        "--eval",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help=f"pairs to evaluate on, the first source also during training: {sources} (default: held-out pairs)",
    )
    _add_run_options(parser.add_argument_group("run"))
    _add_weights_options(parser.add_argument_group("weights"))
    _add_pairs_options(parser.add_argument_group("pairs"))
    _add_steps_options(parser.add_argument_group("optimization"))
    return parser


_DEFAULT = Recipe()


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add("--overwrite", action="store_true", help="replace a model in --out, and in --merge")
    add("--keep-checkpoints", action="store_true", help="leave --out/checkpoints after success")
    add(
        "--report-to", default="none", metavar="NAMES", help="report metrics to tensorboard, wandb or tensorboard,wandb"
    )


def _add_weights_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--full", action="store_true", help="train all weights instead of a LoRA adapter")
    add("--adapter", type=Path, metavar="DIR", help="continue the training of this adapter of the base, with its head")
    add("--lora-rank", type=int, metavar="N", default=_DEFAULT.lora_rank, help="rank of the adapter")
    add("--lora-layers", type=int, metavar="N", help="adapt only this many of the topmost layers (default: all)")
    add(
        "--dtype",
        choices=DtypeChoice.__args__,  # type: ignore[attr-defined]  # a Literal has its values
        default=_DEFAULT.dtype,
        help="of the computation and of the saved weights; auto: bf16 where the device multiplies it natively",
    )


def _add_pairs_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--objectives",
        nargs="+",
        type=parse_objective,
        default=[],
        metavar="NAME[=WEIGHT]",
        help="train one output for each of these names, on the pairs whose field objective has it; the weights make "
        "one reward of the outputs",
    )
    add(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help=f"longer pairs are left out (default: {_DEFAULT.max_length}, or the base's positions if they are fewer)",
    )
    add("--shorten-prompts", action="store_true", help="remove the oldest messages of long conversations")
    add(
        "--balance-lengths",
        action="store_true",
        help="leave pairs out until longer and shorter completions are chosen equally often",
    )
    add(
        "--contrast",
        type=float,
        metavar="SHARE",
        default=_DEFAULT.contrast,
        help="also train on this many contrast pairs for each pair, made from its chosen completion",
    )
    add(
        "--contrast-families",
        nargs="+",
        type=parse_family,
        default=[],
        metavar="NAME[=WEIGHT]",
        help=f"how contrast pairs are made, some of {', '.join(FAMILIES)} (default: all, in equal shares)",
    )
    add(
        "--hold-out-percent",
        type=float,
        metavar="PERCENT",
        default=_DEFAULT.hold_out_percent,
        help="percentage of the prompts that are never trained on",
    )
    add(
        "--min-support",
        type=float,
        metavar="SHARE",
        help="leave out pairs of which a smaller share of the annotators preferred the chosen completion",
    )


def _add_steps_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=float, metavar="N", default=_DEFAULT.epochs, help="passes over the pairs")
    add("--learning-rate", type=float, metavar="RATE", default=_DEFAULT.learning_rate, help="peak of the learning rate")
    add(
        "--warmup-share",
        type=float,
        metavar="SHARE",
        default=_DEFAULT.warmup_share,
        help="share of the steps for the warm-up",
    )
    add("--batch-pairs", type=int, metavar="N", default=_DEFAULT.batch_pairs, help="pairs per optimizer step")
    add(
        "--micro-batch-pairs",
        type=int,
        metavar="N",
        default=_DEFAULT.micro_batch_pairs,
        help="pairs per backward pass of a process; divides --batch-pairs",
    )
    add(
        "--center-coefficient",
        type=float,
        metavar="C",
        help="weight of the centring term, which fixes the zero of the rewards; try 0.01 (default: no such term)",
    )
    add(
        "--patience",
        type=int,
        metavar="N",
        help="stop after this many evaluations without a lower loss (default: train to the end)",
    )
    add("--eval-steps", type=int, metavar="N", default=_DEFAULT.eval_steps, help="steps between evaluations")
    add("--eval-pairs", type=int, metavar="N", default=_DEFAULT.eval_pairs, help="pairs of an evaluation in training")
    add(
        "--checkpoint-steps", type=int, metavar="N", default=_DEFAULT.checkpoint_steps, help="steps between checkpoints"
    )
    add("--seed", type=int, metavar="N", default=_DEFAULT.seed, help="of the order of pairs and of random draws")
