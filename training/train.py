"""``reward-train``: preference pairs in, a scalar-head reward model out."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.demo_base import DEMO_BASE, obtain_demo_base
from service.errors import DatasetError, StartupError
from service.holdout import is_held_out
from training.evaluation import Evaluation, evaluate
from training.manifest import Manifest, PairCounts, data_hashes, weights_hash
from training.pairs import PreferencePair, TokenizedPair, balance_lengths, read_pairs, tokenize_pair
from training.recipe import Recipe
from training.reward_model import load_base
from training.trainer import run_training

DEMO = "demo"
"""What ``--base`` calls the base model of the demo."""

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class TrainingPairs:
    """The pairs that training may see, tokenized, and what became of the others."""

    pairs: list[TokenizedPair]
    counts: PairCounts


def train(
    data: Sequence[Path], base: str, out_dir: Path, recipe: Recipe, eval_files: Sequence[Path] = (), *, resume: bool = False
) -> Manifest:
    """Train a reward model and write it to ``out_dir``: a PEFT adapter, or a whole checkpoint if ``recipe.full``.

    Beside it go the tokenizer, ``training.json`` (the manifest that is returned), ``log.jsonl`` and ``checkpoints/``.

    Args:
        data: files of pairs to train on, or folders of them.
        base: a checkpoint folder, a hub id, or ``demo``.
        out_dir: made if it does not exist.
        recipe: the numbers of the run.
        eval_files: files of pairs to evaluate on; the first one also while training.
        resume: go on from the last checkpoint in ``out_dir``.

    Raises:
        DatasetError: a data file cannot be read, or no pair is left to train on.
        CheckpointError: the base cannot be had or is not fit for a scalar head.
    """
    base_path = obtain_demo_base() if base == DEMO else Path(base)
    base_name = DEMO_BASE if base == DEMO else base
    model, tokenizer = load_base(base_path if base_path.is_dir() else base, recipe)
    training = select_pairs(read_pairs(data), tokenizer, recipe)
    console.print(f"Pairs: {training.counts}")
    evaluation_pairs = {file.name: _tokenize(read_pairs([file]), tokenizer) for file in eval_files}

    out_dir.mkdir(parents=True, exist_ok=True)
    watched = _watched_pairs(next(iter(evaluation_pairs.values()), []), recipe)
    trained = run_training(model, tokenizer, training.pairs, watched, recipe, out_dir, resume=resume)
    _save(trained, tokenizer, base_name, out_dir)

    evaluations = {name: evaluate(trained, pairs) for name, pairs in evaluation_pairs.items()}
    manifest = Manifest(
        base=base_name,
        base_hash=weights_hash(base_path),
        data_hashes=data_hashes(data),
        pairs=training.counts,
        recipe=recipe,
        evaluations=evaluations,
    )
    manifest.write(out_dir)
    return manifest


def select_pairs(
    pairs: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> TrainingPairs:
    """Leave out what the recipe leaves out: held-out prompts, surplus lengths, pairs that are too long.

    Raises:
        DatasetError: no pair is left.
    """
    read = list(pairs)
    allowed = [pair for pair in read if not is_held_out(pair.prompt, recipe.hold_out_percent)]
    tokenized = _tokenize(allowed, tokenizer)
    short_enough = [pair for pair in tokenized if pair.num_tokens <= recipe.max_length]
    chosen = _balanced(short_enough, recipe) if recipe.balance_lengths else short_enough
    if not chosen:
        raise DatasetError(
            f"No pair is left to train on: of {len(read)} pairs {len(read) - len(allowed)} are held out "
            f"and {len(allowed) - len(short_enough)} are longer than {recipe.max_length} tokens."
        )
    counts = PairCounts(
        held_out=len(read) - len(allowed),
        too_long=len(allowed) - len(short_enough),
        unbalanced=len(short_enough) - len(chosen),
        trained=len(chosen),
    )
    return TrainingPairs(chosen, counts)


def _balanced(tokenized: Sequence[TokenizedPair], recipe: Recipe) -> list[TokenizedPair]:
    kept = {id(pair) for pair in balance_lengths([pair.pair for pair in tokenized], recipe.seed)}
    return [pair for pair in tokenized if id(pair.pair) in kept]


def _tokenize(pairs: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedPair]:
    return [
        tokenize_pair(pair, tokenizer)
        for pair in track(list(pairs), "Tokenizing", console=console, transient=True)
    ]


def _watched_pairs(pairs: Sequence[TokenizedPair], recipe: Recipe) -> list[TokenizedPair]:
    """The pairs that are evaluated while training: a fixed draw, within the same length limit."""
    short_enough = [pair for pair in pairs if pair.num_tokens <= recipe.max_length]
    drawn = min(recipe.eval_pairs, len(short_enough))
    return random.Random(recipe.seed).sample(short_enough, drawn)  # noqa: S311 - a reproducible draw, not a secret


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base_name: str, out_dir: Path) -> None:
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-train``; returns the exit status: 0, or 1 after one sentence on standard error."""
    options = _parser().parse_args(arguments)
    recipe = Recipe(
        full=options.full,
        lora_rank=options.lora_rank,
        lora_layers=options.lora_layers,
        learning_rate=options.learning_rate,
        warmup_share=options.warmup_share,
        epochs=options.epochs,
        max_length=options.max_length,
        batch_pairs=options.batch_pairs,
        micro_batch_pairs=options.micro_batch_pairs,
        hold_out_percent=options.hold_out_percent,
        balance_lengths=options.balance_lengths,
        dtype=options.dtype,
        checkpoint_steps=options.checkpoint_steps,
        eval_steps=options.eval_steps,
        eval_pairs=options.eval_pairs,
        seed=options.seed,
    )
    try:
        manifest = train(options.data, options.base, options.out, recipe, options.eval, resume=options.resume)
    except StartupError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    for name, evaluation in manifest.evaluations.items():
        console.print(describe(name, evaluation), markup=False)
    return 0


def describe(name: str, evaluation: Evaluation) -> str:
    """Return one line for people: accuracy and its standard error, beside what length alone gets."""
    accuracy, longer_wins = evaluation.accuracy, evaluation.longer_wins
    return (
        f"{name}: accuracy {accuracy.value:.1%} ± {accuracy.standard_error:.1%} on {evaluation.num_pairs} pairs; "
        f"longer answer wins {longer_wins.value:.1%} ± {longer_wins.standard_error:.1%}; "
        f"correlation of reward with log length {evaluation.log_length_correlation:+.2f}"
    )


def _parser() -> argparse.ArgumentParser:
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="reward-train",
        description="Train a scalar-head reward model on preference pairs (prompt, chosen, rejected).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of pairs, or folders of them")
    parser.add_argument("--base", default=DEMO, help="checkpoint folder, hub id, or 'demo'")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--eval", type=Path, nargs="+", default=[], help="files to evaluate on; the first also midway")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA adapter")
    parser.add_argument("--lora-rank", type=int, default=default.lora_rank, help="rank of the adapter")
    parser.add_argument("--lora-layers", type=int, help="adapt only this many of the topmost layers; faster")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="peak learning rate")
    parser.add_argument("--warmup-share", type=float, default=default.warmup_share, help="share of steps to warm up")
    parser.add_argument("--epochs", type=float, default=default.epochs, help="passes over the pairs")
    parser.add_argument("--max-length", type=int, default=default.max_length, help="tokens; longer pairs are left out")
    parser.add_argument("--batch-pairs", type=int, default=default.batch_pairs, help="pairs per step")
    parser.add_argument("--micro-batch-pairs", type=int, default=default.micro_batch_pairs, help="pairs per backward")
    parser.add_argument("--hold-out-percent", type=float, default=default.hold_out_percent, help="prompts not trained on")
    parser.add_argument("--balance-lengths", action="store_true", help="make longer and shorter answers win equally often")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=default.dtype, help="of computation and result")
    parser.add_argument("--checkpoint-steps", type=int, default=default.checkpoint_steps, help="steps between saves")
    parser.add_argument("--eval-steps", type=int, default=default.eval_steps, help="steps between evaluations")
    parser.add_argument("--eval-pairs", type=int, default=default.eval_pairs, help="pairs of an evaluation midway")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the order of pairs and of random draws")
    return parser


if __name__ == "__main__":
    sys.exit(main())
