"""``reward-train``: trains a scalar-head reward model on preference pairs.

Arguments, files and folders are checked before torch and its companions are imported, which takes many seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.arguments import CommandParser
from service.commands import run_command
from service.errors import CheckpointError, SettingsError
from training.arguments import (
    RunOptions,
    argument_parser,
    check_first_rows,
    check_folders,
    check_resumed_run,
    read_recipe,
    read_run_options,
)
from training.processes import Processes, read_processes
from training.recipe import Recipe, check_recipe
from training.sources import Source

if TYPE_CHECKING:
    from rich.console import Console

    from training.base_checkpoint import BaseFacts
    from training.manifest import Manifest


def train(
    data: Sequence[Source],
    base: str,
    out_dir: Path,
    recipe: Recipe,
    eval_sources: Sequence[Source] = (),
    options: RunOptions | None = None,
    console: Console | None = None,
    adapter: Path | None = None,
) -> Manifest:
    """Train a reward model and write it to ``out_dir``: a PEFT adapter, or a whole checkpoint if ``recipe.full``.

    The folder also receives the tokenizer, ``training.json`` (the returned manifest), ``reward_model.json``,
    a model card and ``log.jsonl``.
    All processes of a launcher call this alike; the first one writes.

    Args:
        data: pairs to train on: files, folders of them, or data sets on the hub.
        base: a checkpoint folder, a hub id, or ``demo``.
        out_dir: created if it does not exist; it must be empty unless ``options`` say otherwise.
        recipe: the hyperparameters of the run.
        eval_sources: pairs to evaluate on at the end; a sample of the first source is also evaluated during training.
            Without any, a sample of the held-out pairs is evaluated at the end.
        options: resuming, overwriting, merging, checkpoints and reports.
        console: shows stages and progress; None: nothing is shown.
        adapter: the folder of an adapter of the same base, whose training is continued; None: a new one is trained.

    Raises:
        SettingsError: a hyperparameter is out of range for itself, the base or the number of processes.
        OutputError: a folder cannot be written, or has files that would be replaced.
        DatasetError: a source cannot be read, or no pair is left to train on.
        CheckpointError: the base cannot be loaded, or does not support a scalar head.
        TrainingError: the loss is not finite, or the device does not have enough memory.
    """
    options, processes = options or RunOptions(), read_processes()
    check_settings(recipe, options, processes, evaluates=bool(eval_sources))
    check_adapter(adapter, recipe)
    check_inputs([*data, *eval_sources], base, out_dir, options, processes)
    return _train_on(
        find_base(base, recipe.objectives), data, out_dir, recipe, eval_sources, options, processes, console, adapter
    )


def _train_on(
    base: tuple[Path, str, BaseFacts],
    data: Sequence[Source],
    out_dir: Path,
    recipe: Recipe,
    eval_sources: Sequence[Source],
    options: RunOptions,
    processes: Processes,
    console: Console | None,
    adapter: Path | None,
) -> Manifest:
    """Train on a base that was found, after the checks of everything else."""
    from rich.console import Console

    from training.base_checkpoint import check_against_base

    folder, name, facts = base
    check_against_base(recipe, facts.num_layers, facts.max_positions)
    if options.resume:
        check_resumed_run(out_dir, recipe, name)

    from training.run import Inputs, run

    inputs = Inputs(tuple(data), tuple(eval_sources), folder, name, adapter)
    shown = console if console and processes.is_main else Console(quiet=True)
    return run(inputs, out_dir, recipe, options, processes, shown)


def check_settings(recipe: Recipe, options: RunOptions, processes: Processes, *, evaluates: bool) -> None:
    """Check the hyperparameters as far as they do not depend on the base.

    Raises:
        SettingsError: one is out of range, or contradicts another; names the options.
    """
    check_recipe(recipe)
    recipe.accumulation_steps(processes.count)
    if recipe.patience is not None and not evaluates:
        raise SettingsError(
            "--patience needs --eval: early stopping depends on the loss on pairs that are not trained on."
        )
    if options.merged_dir is not None and recipe.full:
        raise SettingsError("--merge is for adapters; --full writes a whole checkpoint already.")


def check_adapter(adapter: Path | None, recipe: Recipe) -> None:
    """Check that there is an adapter to continue, as far as that can be seen from its files.

    Raises:
        SettingsError: all weights are trained.
        CheckpointError: the folder holds no adapter.
    """
    if adapter is None:
        return
    if recipe.full:
        raise SettingsError("--adapter and --full exclude each other: one continues an adapter, the other has none.")
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"--adapter {adapter} holds no adapter: there is no adapter_config.json.")


def check_inputs(
    sources: Sequence[Source], base: str, out_dir: Path, options: RunOptions, processes: Processes
) -> None:
    """Check the folders that are written and the first row of every source.

    Raises:
        SettingsError, OutputError, DatasetError: see `train`.
    """
    if processes.is_main:
        # The first process creates and clears the folders while others may still be starting.
        check_folders(out_dir, [base, *sources], options)
    check_first_rows(sources)


def find_base(base: str, objectives: Sequence[str] = ()) -> tuple[Path, str, BaseFacts]:
    """Return the folder of a base, its name in the manifest, and what its configuration tells.

    Args:
        base: as for `train`.
        objectives: of the recipe.

    Raises:
        SettingsError: the base has other outputs than the objectives.
        CheckpointError: see `train`.
    """
    from service.checkpoints.reward_description import refuse_described_head
    from training.base_checkpoint import locate_base, read_base_facts

    folder, name = locate_base(base)
    refuse_described_head(folder, "trained further")
    _check_outputs(folder, objectives)
    return folder, name, read_base_facts(folder, max(1, len(objectives)))


def _check_outputs(folder: Path, objectives: Sequence[str]) -> None:
    """Refuse to train further the outputs of a model under other names or in another order."""
    from service.checkpoints.reward_description import read_description

    description = read_description(folder)
    if description is not None and len(description.outputs) > 1 and description.outputs != tuple(objectives):
        raise SettingsError(
            f"The base has the outputs {' '.join(description.outputs)}: give --objectives these names, in this order."
        )


def command_parser() -> CommandParser:
    """Return the parser of ``reward-train``."""
    return argument_parser()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-train``; returns the exit status: 0, or 1 after one sentence on standard error."""
    return run_command(
        "reward-train",
        "train",
        lambda: _run(arguments),
        when_interrupted="stopped; --resume continues from the last checkpoint, if there is one.",
        silent=not _prints_errors(),
    )


def _prints_errors() -> bool:
    try:
        return read_processes().local_rank == 0
    except SettingsError:
        return True


def _run(arguments: Sequence[str] | None) -> int:
    options = argument_parser().parse(arguments)
    processes = read_processes()

    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    manifest = _train(options, processes, console)
    if processes.is_main:
        served = options.merge or options.out
        for line in [*_report(manifest), f"Serve it with: reward-serve --model {served}"]:
            console.print(line, markup=False)
    return 0


def _train(options: argparse.Namespace, processes: Processes, console: Console) -> Manifest:
    run_options = read_run_options(options)
    check_settings(read_recipe(options), run_options, processes, evaluates=bool(options.eval))
    check_adapter(options.adapter, read_recipe(options))
    check_inputs([*options.data, *options.eval], options.base, options.out, run_options, processes)
    base = find_base(options.base, read_recipe(options).objectives)
    recipe = read_recipe(options, max_positions=base[2].max_positions)
    # TRL reports every run to its authors otherwise; the variable is read when the libraries are imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return _train_on(
        base, options.data, options.out, recipe, options.eval, run_options, processes, console, options.adapter
    )


def _report(manifest: Manifest) -> list[str]:
    from training.annotator_agreement import describe_annotator_agreement
    from training.evaluation import describe

    counts, recipe = manifest.pairs, manifest.recipe
    summary = (
        f"Trained on {counts.trained} pairs; left out: {counts.held_out} held out, {counts.disputed} disputed, "
        f"{counts.refused} that cannot be "
        f"tokenized, {counts.too_long} longer than {recipe.max_length} tokens, {counts.unbalanced} to balance lengths."
    )
    lines = [summary]
    if manifest.contrast_pairs:
        made = ", ".join(f"{number} {family}" for family, number in manifest.contrast_pairs.items())
        lines.append(f"Contrast pairs beside them: {made}.")
    if recipe.patience is not None:
        lines.append(
            f"Stopped after {manifest.num_steps} steps and selected the weights of step {manifest.selected_step}."
        )
    if manifest.annotator_agreement is not None:
        lines.append(describe_annotator_agreement(manifest.annotator_agreement))
    return lines + [describe(name, evaluation) for name, evaluation in manifest.evaluations.items()]


if __name__ == "__main__":
    sys.exit(main())
