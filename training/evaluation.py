"""How often a reward model agrees with preferences or is right on contrast pairs, beside the accuracy of length alone.

Accuracy is the share of pairs in which the chosen completion has the higher reward, which is where the Bradley-Terry
model (Bradley and Terry 1952) puts the more probable preference; a tie counts one half.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from service.checkpoints.architecture import inputs_of
from service.data.reading import Tell
from service.diagnostics.correlation import pearson_correlation
from service.offline import MAX_BATCH_SEQUENCES, plan_batches
from service.records import TokenSequence
from service.scheduling.budget import BatchBudget
from training.contrast import CONTRAST_SOURCE, FAMILIES, make_contrasts
from training.pairs import TokenizedPair, tokenize_usable_pairs
from training.preferences import PreferencePair, read_pairs

MAX_BATCH_TOKENS = 8192
"""Padded tokens of one forward pass; enough for the throughput of two cores, and fits the memory of a laptop."""


EvaluatePairs: TypeAlias = Callable[[Sequence[PreferencePair]], "Evaluation"]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of pairs between 0 and 1, with the standard error of its estimate, sqrt(p (1 - p) / n)."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, margins: Iterable[float]) -> Share:
        """Return the share of positive margins, ties counted one half.

        NaN for no margins at all, and where one is not finite: such a model orders nothing.
        """
        wins = [(margin > 0) + 0.5 * (margin == 0) if math.isfinite(margin) else math.nan for margin in margins]
        value = sum(wins) / len(wins) if wins else math.nan
        return cls(value, math.sqrt(value * (1 - value) / len(wins)) if wins else math.nan)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Agreement with human preferences on one data file."""

    num_pairs: int
    accuracy: Share

    longer_wins: Share
    """Accuracy of preferring the longer completion (in characters) on the same pairs."""

    mean_margin: float
    """Mean of chosen minus rejected reward; NaN for no pairs."""

    log_length_correlation: float
    """Pearson's correlation of the reward with the logarithm of the completion's characters."""

    within_pairs_correlation: float
    """The same after the mean of each pair was subtracted from both."""


def evaluate(model: PreTrainedModel, pairs: Sequence[TokenizedPair], output: int = 0) -> Evaluation:
    """Score both completions of each pair and compare the rewards, one output of the head, with the human choice."""
    chosen = rewards(model, [pair.chosen_ids for pair in pairs], output)
    rejected = rewards(model, [pair.rejected_ids for pair in pairs], output)
    return measure([pair.pair for pair in pairs], chosen, rejected)


def measure(
    pairs: Sequence[PreferencePair], chosen: NDArray[np.floating], rejected: NDArray[np.floating]
) -> Evaluation:
    """Compare the rewards of the pairs' completions, [pair] each, with the human choice."""
    chosen, rejected = (np.where(np.isfinite(found), found, np.nan) for found in (chosen, rejected))
    margins = chosen - rejected
    log_lengths = np.array([math.log1p(len(text)) for text in _completions(pairs)])
    excess = log_lengths[0::2] - log_lengths[1::2]
    return Evaluation(
        num_pairs=len(pairs),
        accuracy=Share.of(margins.tolist()),
        longer_wins=Share.of(pair.excess_chars for pair in pairs),
        mean_margin=float(margins.mean()) if len(pairs) else math.nan,
        log_length_correlation=pearson_correlation(np.stack([chosen, rejected], axis=1).ravel(), log_lengths),
        within_pairs_correlation=pearson_correlation(np.append(margins, -margins), np.append(excess, -excess)),
    )


def describe(name: str, evaluation: Evaluation) -> str:
    """Return one line of text: accuracy with its standard error, beside the accuracy of length alone."""
    accuracy, longer_wins = evaluation.accuracy, evaluation.longer_wins
    if not evaluation.num_pairs:
        return f"{name}: no pairs"
    if math.isnan(accuracy.value):
        return f"{name}: no accuracy, since not all rewards of the {evaluation.num_pairs} pairs are finite"
    return (
        f"{name}: accuracy {accuracy.value:.1%} ± {accuracy.standard_error:.1%} on {evaluation.num_pairs} pairs; "
        f"longer answer wins {longer_wins.value:.1%} ± {longer_wins.standard_error:.1%}; "
        f"correlation of reward with log length {_signed(evaluation.log_length_correlation)}, "
        f"within pairs {_signed(evaluation.within_pairs_correlation)}"
    )


def _signed(correlation: float) -> str:
    return "undefined" if math.isnan(correlation) else f"{correlation:+.2f}"


def rewards(model: PreTrainedModel, sequences: Sequence[tuple[int, ...]], output: int = 0) -> NDArray[np.float32]:
    """Return the raw rewards, float32 [sequence], in input order: one output of the head.

    The forward pass is the model's own, not that of an engine: the model is the object that the trainer holds, with its
    adapter and in its dtype, and an engine loads a checkpoint from files. The batches are those that the service forms
    for padded passes. Pooling is transformers' own: the rightmost token that is not the pad token.
    """
    answers = np.empty(len(sequences), dtype=np.float32)
    pad_id = model.config.get_text_config().pad_token_id
    budget = BatchBudget("padded", MAX_BATCH_TOKENS, MAX_BATCH_SEQUENCES)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in plan_batches(map(TokenSequence, sequences), budget):
            ids, mask = _pad([sequence.token_ids for sequence in batch.sequences], pad_id)
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
            for indices, reward in zip(batch.indices, logits[:, output].float().cpu().numpy(), strict=True):
                answers[list(indices)] = reward
    model.train(was_training)
    return answers


def _pad(sequences: Sequence[tuple[int, ...]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(sequences), max(map(len, sequences))), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def _completions(pairs: Iterable[PreferencePair]) -> Iterator[str]:
    for pair in pairs:
        yield from pair.texts


def _plain(folder: str, dtype: str, tell: Tell) -> EvaluatePairs:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))

    def evaluate_pairs(pairs: Sequence[PreferencePair]) -> Evaluation:
        return evaluate(model, tokenize_usable_pairs(pairs, tokenizer, inputs_of(model), tell) if pairs else [])

    return evaluate_pairs


def _served(source: str) -> EvaluatePairs:
    from training.audit.scoring import load_checkpoint_scorer, score_pairs

    scorer = load_checkpoint_scorer(Path(source), truncation="error")

    def evaluate_pairs(pairs: Sequence[PreferencePair]) -> Evaluation:
        scored = score_pairs(pairs, scorer, lambda _: None)
        return measure(scored.pairs, scored.chosen, scored.rejected)

    return evaluate_pairs


_DESCRIPTION = "Print how often a plain checkpoint agrees with the pairs of each file."


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the agreement of a plain checkpoint with the pairs of each file: ``python -m training.evaluation``.

    With ``--contrast`` also the share of contrast pairs, made from those pairs, that it orders right, by family.
    """
    parser = argparse.ArgumentParser(prog="python -m training.evaluation", description=_DESCRIPTION)
    parser.add_argument("model", help="folder of a plain scalar-head checkpoint")
    parser.add_argument("files", type=Path, nargs="+", help="files of pairs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the forward pass")
    parser.add_argument(
        "--contrast",
        type=int,
        metavar="N",
        default=0,
        help="also make N contrast pairs of each family from the pairs of each file, and evaluate on them",
    )
    parser.add_argument(
        "--served",
        action="store_true",
        help="compute rewards as the service does by default, several times as fast; the model may also be 'demo'",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the contrast pairs")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    tell = partial(console.print, markup=False, highlight=False)
    evaluate_pairs = _served(options.model) if options.served else _plain(options.model, options.dtype, tell)
    for file in options.files:
        pairs = list(read_pairs([file], tell))
        tell(describe(file.name, evaluate_pairs(pairs)))
        for family in FAMILIES if options.contrast else ():
            contrasts = make_contrasts(pairs, {family: options.contrast}, options.seed)
            tell(describe(f"{file.name}, {CONTRAST_SOURCE}{family}", evaluate_pairs(contrasts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
