"""``reward-train``: trains a scalar-head reward model on preference pairs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from reward_client.provenance import base_hash
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.checkpoints.adapter import merge_adapter
from service.checkpoints.architecture import inputs_of
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.demo_base import DEMO_BASE, obtain_demo_base
from service.errors import SettingsError, StartupError
from service.records import ModelInputs
from service.settings import ModelSettings
from service.version import add_version_option
from training.annotator_agreement import describe_annotator_agreement, measure_annotator_agreement
from training.evaluation import describe, evaluate
from training.manifest import Manifest
from training.pairs import TokenizedPair, shorten_prompts, tokenize_pairs
from training.preferences import PreferencePair, read_pairs
from training.recipe import Recipe
from training.reward_model import load_base, local_folder
from training.selection import select_pairs, watched_pairs
from training.sources import Source, source_hashes
from training.trainer import run_training

DEMO = "demo"
"""The value of ``--base`` that stands for the base of the demo model."""


def train(
    data: Sequence[Source],
    base: str,
    out_dir: Path,
    recipe: Recipe,
    eval_sources: Sequence[Source] = (),
    *,
    resume: bool = False,
) -> Manifest:
    """Train a reward model and write it to ``out_dir``: a PEFT adapter, or a whole checkpoint if ``recipe.full``.

    The folder also receives the tokenizer, ``training.json`` (the returned manifest), ``log.jsonl`` and
    ``checkpoints/``.

    Args:
        data: pairs to train on: files, folders of them, or data sets on the hub.
        base: a checkpoint folder, a hub id, or ``demo``.
        out_dir: created if it does not exist.
        recipe: the hyperparameters of the run.
        eval_sources: pairs to evaluate on at the end; a sample of the first source is also evaluated during training.
        resume: continue from the last checkpoint in ``out_dir``.

    Raises:
        DatasetError: a source cannot be read, or no pair is left to train on.
        CheckpointError: the base cannot be loaded, or does not support a scalar head.
        SettingsError: early stopping is requested without ``eval_sources``.
    """
    if recipe.patience is not None and not eval_sources:
        raise SettingsError(
            "--patience needs --eval: early stopping depends on the loss on pairs that are not trained on."
        )
    base_path, base_name = (obtain_demo_base(), DEMO_BASE) if base == DEMO else (Path(base), base)
    model, tokenizer = load_base(base_path if base_path.is_dir() else base, recipe)
    pairs = list(read_pairs(data))
    inputs = inputs_of(model)
    selection = select_pairs(_tokenize(pairs, tokenizer, inputs, recipe), recipe)
    evaluated = {_name(source): tokenize_pairs(read_pairs([source]), tokenizer, inputs) for source in eval_sources}
    watched = watched_pairs(next(iter(evaluated.values()), []), recipe)

    out_dir.mkdir(parents=True, exist_ok=True)
    run = run_training(model, tokenizer, selection.pairs, watched, recipe, out_dir, resume=resume)
    _save(run.model, tokenizer, base_name, out_dir)

    manifest = Manifest(
        base=base_name,
        base_hash=base_hash(local_folder(base_path)),
        data_hashes=source_hashes(data),
        pairs=selection.counts,
        recipe=recipe,
        num_steps=run.num_steps,
        selected_step=run.selected_step,
        evaluations={name: evaluate(run.model, tokenized) for name, tokenized in evaluated.items()},
        annotator_agreement=measure_annotator_agreement(pairs),
    )
    manifest.write(out_dir)
    return manifest


def _name(source: Source) -> str:
    return source.name if isinstance(source, Path) else Path(source).name


def _tokenize(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, inputs: ModelInputs, recipe: Recipe
) -> list[TokenizedPair]:
    tokenized = tokenize_pairs(pairs, tokenizer, inputs)
    return shorten_prompts(tokenized, tokenizer, recipe.max_length, inputs) if recipe.shorten_prompts else tokenized


def _save(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, base_name: str, out_dir: Path
) -> None:
    if isinstance(model, PeftModel):
        model.active_peft_config.base_model_name_or_path = base_name
        # The embeddings are never adapted; by default PEFT would look the base up on the hub to find that out.
        model.save_pretrained(out_dir, save_embedding_layers=False)
    else:
        model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-train``; returns the exit status: 0, or 1 after one sentence on standard error."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True)
    try:
        recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
        if options.merge and recipe.full:
            raise SettingsError("--merge is for adapters; --full writes a whole checkpoint already.")
        manifest = train(options.data, options.base, options.out, recipe, options.eval, resume=options.resume)
        served = _finish_checkpoint(options.out, options.merge, Path(options.base), full=recipe.full)
    except StartupError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    for line in [*_report(manifest), f"Serve it with: reward-serve --model {served}"]:
        console.print(line, markup=False, highlight=False)
    return 0


def _finish_checkpoint(out_dir: Path, merged_dir: Path | None, base: Path, *, full: bool) -> Path:
    """Merge if requested, and validate a whole checkpoint as the service does; one that it refuses is an error."""
    if merged_dir is not None:
        merge_adapter(out_dir, merged_dir, base if base.is_dir() else None)
    if full or merged_dir is not None:
        open_checkpoint(merged_dir or out_dir, ModelSettings())
    return merged_dir or out_dir


def _report(manifest: Manifest) -> list[str]:
    counts, recipe = manifest.pairs, manifest.recipe
    summary = (
        f"Trained on {counts.trained} pairs; left out: {counts.held_out} held out, {counts.disputed} disputed, "
        f"{counts.too_long} longer than {recipe.max_length} tokens, {counts.unbalanced} to balance lengths."
    )
    lines = [summary]
    if recipe.patience is not None:
        lines.append(
            f"Stopped after {manifest.num_steps} steps and selected the weights of step {manifest.selected_step}."
        )
    if manifest.annotator_agreement is not None:
        lines.append(describe_annotator_agreement(manifest.annotator_agreement))
    return lines + [describe(name, evaluation) for name, evaluation in manifest.evaluations.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reward-train",
        description="Train a scalar-head reward model on preference pairs (prompt, chosen, rejected).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sources = "files, folders of them, or data sets on the hub (owner/name or owner/name:split)"
    add_version_option(parser)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help=f"pairs to train on: {sources}")
    add("--base", default=DEMO, help="SFT or instruct checkpoint: a folder, a hub id, or 'demo'")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--merge", type=Path, metavar="DIR", help="also merge adapter and base into a plain checkpoint folder")
    add("--eval", nargs="+", default=[], help=f"pairs to evaluate on, the first source also during training: {sources}")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    _add_weights_options(parser.add_argument_group("weights"))
    _add_pairs_options(parser.add_argument_group("pairs"))
    _add_steps_options(parser.add_argument_group("optimization"))
    return parser


_DEFAULT = Recipe()


def _add_weights_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--full", action="store_true", help="train all weights instead of a LoRA adapter")
    add("--lora-rank", type=int, default=_DEFAULT.lora_rank, help="rank of the adapter")
    add("--lora-layers", type=int, default=_DEFAULT.lora_layers, help="adapt only this many of the topmost layers")
    add("--dtype", choices=("bf16", "fp32"), default=_DEFAULT.dtype, help="of the computation and of the saved weights")


def _add_pairs_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-length", type=int, default=_DEFAULT.max_length, help="tokens; longer pairs are left out")
    add("--shorten-prompts", action="store_true", help="remove the oldest messages of long conversations")
    add(
        "--balance-lengths",
        action="store_true",
        help="leave pairs out until longer and shorter completions are chosen equally often",
    )
    add(
        "--hold-out-percent",
        type=float,
        default=_DEFAULT.hold_out_percent,
        help="percentage of the prompts that are never trained on",
    )
    add(
        "--min-support",
        type=float,
        default=_DEFAULT.min_support,
        help="leave out pairs of which a smaller share of the annotators preferred the chosen completion",
    )


def _add_steps_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=float, default=_DEFAULT.epochs, help="passes over the pairs")
    add("--learning-rate", type=float, default=_DEFAULT.learning_rate, help="peak of the learning rate")
    add("--warmup-share", type=float, default=_DEFAULT.warmup_share, help="share of the steps for the warm-up")
    add("--batch-pairs", type=int, default=_DEFAULT.batch_pairs, help="pairs per optimizer step")
    add("--micro-batch-pairs", type=int, default=_DEFAULT.micro_batch_pairs, help="pairs per backward pass")
    add(
        "--center-coefficient",
        type=float,
        default=_DEFAULT.center_coefficient,
        help="weight of the centring term, which fixes the zero of the rewards; try 0.01",
    )
    add("--patience", type=int, default=_DEFAULT.patience, help="stop after this many evaluations without a lower loss")
    add("--eval-steps", type=int, default=_DEFAULT.eval_steps, help="steps between evaluations")
    add("--eval-pairs", type=int, default=_DEFAULT.eval_pairs, help="pairs of an evaluation during training")
    add("--checkpoint-steps", type=int, default=_DEFAULT.checkpoint_steps, help="steps between checkpoints")
    add("--seed", type=int, default=_DEFAULT.seed, help="of the order of pairs and of random draws")


if __name__ == "__main__":
    sys.exit(main())
