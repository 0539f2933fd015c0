"""``reward-train``: preference pairs in, a scalar-head reward model out."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.adapter import merge_adapter
from service.demo_base import DEMO_BASE, obtain_demo_base
from service.errors import SettingsError, StartupError
from training.evaluation import describe, evaluate
from training.manifest import Manifest, data_hashes, weights_hash
from training.pairs import read_pairs, tokenize_pairs
from training.recipe import Recipe
from training.reward_model import load_base
from training.selection import select_pairs, watched_pairs
from training.trainer import run_training

DEMO = "demo"
"""What ``--base`` calls the base of the demo model."""


def train(
    data: Sequence[Path],
    base: str,
    out_dir: Path,
    recipe: Recipe,
    eval_files: Sequence[Path] = (),
    *,
    resume: bool = False,
) -> Manifest:
    """Train a reward model and write it to ``out_dir``: a PEFT adapter, or a whole checkpoint if ``recipe.full``.

    Beside it go the tokenizer, ``training.json`` (the manifest that is returned), ``log.jsonl`` and ``checkpoints/``.

    Args:
        data: files of pairs to train on, or folders of them.
        base: a checkpoint folder, a hub id, or ``demo``.
        out_dir: made if it does not exist.
        recipe: the numbers of the run.
        eval_files: files of pairs to evaluate on at the end; on some pairs of the first also while training.
        resume: go on from the last checkpoint in ``out_dir``.

    Raises:
        DatasetError: a data file cannot be read, or no pair is left to train on.
        CheckpointError: the base cannot be had, or is not fit for a scalar head.
    """
    base_path, base_name = (obtain_demo_base(), DEMO_BASE) if base == DEMO else (Path(base), base)
    model, tokenizer = load_base(base_path if base_path.is_dir() else base, recipe)
    selection = select_pairs(tokenize_pairs(read_pairs(data), tokenizer), recipe)
    evaluated = {file.name: tokenize_pairs(read_pairs([file]), tokenizer) for file in eval_files}
    watched = watched_pairs(next(iter(evaluated.values()), []), recipe)

    out_dir.mkdir(parents=True, exist_ok=True)
    trained = run_training(model, tokenizer, selection.pairs, watched, recipe, out_dir, resume=resume)
    _save(trained, tokenizer, base_name, out_dir)

    manifest = Manifest(
        base=base_name,
        base_hash=weights_hash(base_path),
        data_hashes=data_hashes(data),
        pairs=selection.counts,
        recipe=recipe,
        evaluations={name: evaluate(trained, pairs) for name, pairs in evaluated.items()},
    )
    manifest.write(out_dir)
    return manifest


def _save(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, base_name: str, out_dir: Path
) -> None:
    if isinstance(model, PeftModel):
        model.active_peft_config.base_model_name_or_path = base_name
        # The embeddings are never adapted; left to itself, PEFT would look the base up on the hub to find that out.
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
            raise SettingsError("--merge is for adapters; --full writes a whole checkpoint anyway.")
        manifest = train(options.data, options.base, options.out, recipe, options.eval, resume=options.resume)
        if options.merge:
            base = Path(options.base)
            merge_adapter(options.out, options.merge, base if base.is_dir() else None)
    except StartupError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    counts = manifest.pairs
    console.print(
        f"Trained on {counts.trained} pairs; left out {counts.held_out} held out, {counts.too_long} longer than "
        f"{recipe.max_length} tokens, {counts.unbalanced} for balance of length."
    )
    for name, evaluation in manifest.evaluations.items():
        console.print(describe(name, evaluation), markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="reward-train",
        description="Train a scalar-head reward model on preference pairs (prompt, chosen, rejected).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="files of pairs, or folders of them")
    add("--base", default=DEMO, help="checkpoint folder, hub id, or 'demo'")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--merge", type=Path, metavar="DIR", help="also merge adapter and base into a plain checkpoint folder")
    add("--eval", type=Path, nargs="+", default=[], help="files to evaluate on; the first also while training")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--full", action="store_true", help="train all weights instead of a LoRA adapter")
    add("--lora-rank", type=int, default=default.lora_rank, help="rank of the adapter")
    add("--lora-layers", type=int, default=default.lora_layers, help="adapt only this many of the topmost layers")
    add("--learning-rate", type=float, default=default.learning_rate, help="peak of the learning rate")
    add("--warmup-share", type=float, default=default.warmup_share, help="share of the steps to warm up")
    add(
        "--epochs",
        type=float,
        default=default.epochs,
        help="passes over the pairs",
    )
    add("--max-length", type=int, default=default.max_length, help="tokens; pairs that are longer are left out")
    add("--batch-pairs", type=int, default=default.batch_pairs, help="pairs per optimizer step")
    add("--micro-batch-pairs", type=int, default=default.micro_batch_pairs, help="pairs per backward pass")
    add("--hold-out-percent", type=float, default=default.hold_out_percent, help="share of prompts never trained on")
    add("--balance-lengths", action="store_true", help="leave pairs out until longer and shorter answers win equally")
    add("--dtype", choices=("bf16", "fp32"), default=default.dtype, help="of the computation and of the saved weights")
    add("--checkpoint-steps", type=int, default=default.checkpoint_steps, help="steps between checkpoints")
    add("--eval-steps", type=int, default=default.eval_steps, help="steps between evaluations")
    add("--eval-pairs", type=int, default=default.eval_pairs, help="pairs of an evaluation while training")
    add("--seed", type=int, default=default.seed, help="of the order of pairs and of random draws")
    return parser


if __name__ == "__main__":
    sys.exit(main())
