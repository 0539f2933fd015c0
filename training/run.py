"""One training run, from a base and pairs to the model's folder.

`training.train` checks the arguments and calls this; here are the parts that need torch, transformers and TRL.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from reward_client.hashing import file_sha256
from reward_client.provenance import base_hash
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.checkpoints.adapter import ADAPTER_WEIGHTS_FILE
from service.checkpoints.architecture import inputs_of
from service.console import stages
from service.data.reading import Tell
from service.engines.devices.device import is_out_of_memory
from service.errors import SettingsError, TrainingError
from service.outputs import writing_to
from service.records import ModelInputs
from training.annotator_agreement import measure_annotator_agreement
from training.arguments import CHECKPOINTS_FOLDER, LEFTOVERS, TENSORBOARD_FOLDER, RunOptions, write_run_file
from training.contrast import CONTRAST_SOURCE, make_contrasts
from training.evaluation import evaluate
from training.manifest import Manifest
from training.model_folder import clear_folder, write_merged, write_model
from training.objectives import by_objective, check_all_trained, check_labels
from training.pairs import TokenizedPair, shorten_prompts, tokenize_pairs, tokenize_usable_pairs
from training.preferences import PreferencePair, read_pairs
from training.processes import Processes
from training.progress import ProgressLine
from training.recipe import Recipe, contrast_counts, resolve_dtype
from training.reward_model import check_continued_adapter, load_base, multiplies_bfloat16
from training.selection import Selection, held_out_pairs, select_pairs, watched_pairs
from training.sources import Source, source_hashes
from training.trainer import run_training

HELD_OUT = "held-out pairs"
"""Name of the evaluation on pairs that were not trained on, where no other pairs are given."""

MAX_HELD_OUT_PAIRS = 1000
"""Pairs of that evaluation: its standard error is then 1.6 points at most."""

TENSORBOARD_VARIABLE = "TENSORBOARD_LOGGING_DIR"

FOLDER_REMEDY = "free space or choose another folder"
WRITE_REMEDY = "free space, then start again, with --resume if a checkpoint was complete"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads."""

    data: tuple[Source, ...]
    """Pairs to train on."""

    eval_sources: tuple[Source, ...]
    """Pairs to evaluate on; none: a sample of the held-out pairs."""

    base_dir: Path
    """The folder of the base."""

    base_name: str
    """The base as the manifest names it."""

    adapter_dir: Path | None = None
    """The adapter whose training is continued; None: a new one."""


@dataclass(frozen=True, slots=True)
class PreparedPairs:
    """The pairs of a run, as the model reads them."""

    read: Sequence[PreferencePair]
    """All pairs of the training data."""

    selection: Selection
    """Those to train on."""

    contrasts: Sequence[TokenizedPair]
    """Contrast pairs to train on beside them."""

    evaluated: Mapping[str, Sequence[TokenizedPair]]
    """Those to evaluate on at the end, by source."""

    watched: Sequence[TokenizedPair]
    """Those to evaluate on during training."""


def run(
    inputs: Inputs, out_dir: Path, recipe: Recipe, options: RunOptions, processes: Processes, console: Console
) -> Manifest:
    """Train, evaluate and write the model's folder; arguments and errors are those of `training.train.train`.

    All processes train and evaluate, and the first one writes.
    """
    _check_devices(processes)
    recipe = replace(recipe, dtype=resolve_dtype(recipe.dtype, native_bfloat16=multiplies_bfloat16()))
    with stages(console) as stage:
        stage("Loading the base")
        model, tokenizer = load_base(inputs.base_dir, recipe)
        if inputs.adapter_dir is not None:
            check_continued_adapter(model, inputs.adapter_dir, recipe)
        stage("Reading and tokenizing the pairs")
        tell = partial(console.print, markup=False, highlight=False)
        pairs = _prepare_pairs(inputs, tokenizer, inputs_of(model), recipe, tell)
        stage(f"Training on {_describe_number(pairs)} in {recipe.dtype} on {_device_name()}")
    if processes.is_main:
        with writing_to(out_dir, FOLDER_REMEDY):
            _prepare_folder(out_dir, options)
            write_run_file(out_dir, recipe, inputs.base_name)
    with writing_to(out_dir, WRITE_REMEDY), _memory_errors(recipe), _tensorboard_folder(out_dir):
        result = run_training(
            model,
            tokenizer,
            [*pairs.selection.pairs, *pairs.contrasts],
            pairs.watched,
            recipe,
            out_dir,
            options=options,
            processes=processes,
            line=ProgressLine(console),
            adapter=inputs.adapter_dir,
        )
    with stages(console) as stage:
        if pairs.evaluated:
            stage(f"Evaluating on {sum(map(len, pairs.evaluated.values()))} pairs")
        manifest = Manifest(
            base=inputs.base_name,
            base_hash=base_hash(inputs.base_dir),
            adapter_hash=_adapter_hash(inputs.adapter_dir),
            data_hashes=source_hashes(inputs.data),
            pairs=pairs.selection.counts,
            recipe=recipe,
            num_steps=result.num_steps,
            selected_step=result.selected_step,
            evaluations={
                name: evaluate(result.model, tokenized, output)
                for name, output, tokenized in by_objective(pairs.evaluated, recipe.objectives)
            },
            contrast_pairs=_count_by_family(pairs.contrasts),
            annotator_agreement=measure_annotator_agreement(pairs.read),
        )
        if processes.is_main:
            stage(f"Writing the model to {out_dir}")
            _write(result.model, tokenizer, manifest, inputs.base_dir, out_dir, options)
    return manifest


def _adapter_hash(folder: Path | None) -> str | None:
    return None if folder is None else file_sha256(folder / ADAPTER_WEIGHTS_FILE)


def _check_devices(processes: Processes) -> None:
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes.count == 1 and num_devices > 1:
        raise SettingsError(
            f"This process sees {num_devices} GPUs and trains on one: set CUDA_VISIBLE_DEVICES=0, or use all of them "
            f"with `accelerate launch --num_processes {num_devices} -m training.train` and the same options."
        )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def _prepare_pairs(
    inputs: Inputs, tokenizer: PreTrainedTokenizerBase, model_inputs: ModelInputs, recipe: Recipe, tell: Tell
) -> PreparedPairs:
    pairs = list(read_pairs(inputs.data, tell))
    if recipe.objectives:
        check_labels(pairs, recipe.objectives)
    tokenized = tokenize_usable_pairs(pairs, tokenizer, model_inputs, tell)
    num_refused = len(pairs) - len(tokenized)
    if recipe.shorten_prompts:
        tokenized = shorten_prompts(tokenized, tokenizer, recipe.max_length, model_inputs)
    names = _names(inputs.eval_sources)
    evaluated = {
        name: tokenize_usable_pairs(read_pairs([source], tell), tokenizer, model_inputs, tell)
        for name, source in zip(names, inputs.eval_sources, strict=True)
    }
    if recipe.objectives:
        check_labels((pair.pair for part in evaluated.values() for pair in part), recipe.objectives)
    watched = watched_pairs(next(iter(evaluated.values()), []), recipe)
    held_out = [] if evaluated else held_out_pairs(tokenized, recipe, MAX_HELD_OUT_PAIRS)
    selection = select_pairs(tokenized, recipe, num_refused)
    check_all_trained((pair.pair for pair in selection.pairs), recipe.objectives)
    return PreparedPairs(
        read=pairs,
        selection=selection,
        contrasts=_make_contrasts(selection.pairs, tokenizer, model_inputs, recipe),
        evaluated=evaluated or ({HELD_OUT: held_out} if held_out else {}),
        watched=watched,
    )


def _make_contrasts(
    pairs: Sequence[TokenizedPair], tokenizer: PreTrainedTokenizerBase, model_inputs: ModelInputs, recipe: Recipe
) -> list[TokenizedPair]:
    """Make the recipe's contrast pairs from those that are trained on, and leave out those that are too long."""
    counts = contrast_counts(recipe, len(pairs))
    contrasts = make_contrasts([_as_trained(pair) for pair in pairs], counts, recipe.seed)
    tokenized = tokenize_pairs(contrasts, tokenizer, model_inputs)
    return [pair for pair in tokenized if pair.num_tokens <= recipe.max_length]


def _as_trained(pair: TokenizedPair) -> PreferencePair:
    """Return a pair with the prompt that its token ids have, of which the oldest messages may be left out."""
    return (
        replace(pair.pair, prompt=pair.pair.prompt[pair.num_dropped_turns :]) if pair.num_dropped_turns else pair.pair
    )


def _count_by_family(contrasts: Sequence[TokenizedPair]) -> dict[str, int]:
    return dict(Counter(pair.pair.source.removeprefix(CONTRAST_SOURCE) for pair in contrasts))


def _describe_number(pairs: PreparedPairs) -> str:
    contrasts = f" and {len(pairs.contrasts)} contrast pairs" if pairs.contrasts else ""
    return f"{pairs.selection.counts.trained} pairs{contrasts}"


def _names(sources: Sequence[Source]) -> list[str]:
    """Return the sources' names without their folders, or their whole paths where two have the same name."""
    names = [Path(source).name for source in sources]
    return names if len(set(names)) == len(names) else [str(source) for source in sources]


def _prepare_folder(out_dir: Path, options: RunOptions) -> None:
    """Create the folder and delete what is to be replaced; `training.arguments.check_folders` has allowed it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if options.overwrite and not options.resume:
        clear_folder(out_dir)
    elif not options.resume:
        for name in LEFTOVERS:
            path = out_dir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _tensorboard_folder(out_dir: Path) -> Iterator[None]:
    """Let transformers write TensorBoard's files into the model's folder, unless the user has set another one.

    Its default is within the checkpoints, which are removed.
    """
    if TENSORBOARD_VARIABLE in os.environ:
        yield
        return
    os.environ[TENSORBOARD_VARIABLE] = str(out_dir / TENSORBOARD_FOLDER)
    try:
        yield
    finally:
        del os.environ[TENSORBOARD_VARIABLE]


@contextmanager
def _memory_errors(recipe: Recipe) -> Iterator[None]:
    """Turn an error for lack of device memory into a sentence with the remedy."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"The device does not have enough memory for {recipe.micro_batch_pairs} pairs of up to "
            f"{recipe.max_length} tokens: lower --micro-batch-pairs or --max-length."
        ) from error


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    base_dir: Path,
    out_dir: Path,
    options: RunOptions,
) -> None:
    with writing_to(out_dir, WRITE_REMEDY):
        write_model(model, tokenizer, manifest, base_dir, out_dir)
    if options.merged_dir is not None:
        with writing_to(options.merged_dir, FOLDER_REMEDY):
            write_merged(out_dir, manifest, base_dir, options.merged_dir)
    if not options.keep_checkpoints:
        shutil.rmtree(out_dir / CHECKPOINTS_FOLDER, ignore_errors=True)
