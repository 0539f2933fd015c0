"""Accuracy, its standard error and its baseline have the values of hand calculations."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_rows import write_pairs
from tiny_models import SENTENCES, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training import evaluation
from training.contrast import FAMILIES
from training.evaluation import Share, describe, evaluate, measure, rewards
from training.pairs import tokenize_pairs
from training.preferences import PreferencePair


def test_a_tie_counts_one_half() -> None:
    """Two wins, a tie and a loss are 2.5 of 4, with the standard error sqrt(p (1 - p) / n)."""
    share = Share.of([0.1, 3.0, 0.0, -1.0])

    assert share.value == 0.625
    assert share.standard_error == pytest.approx(math.sqrt(0.625 * 0.375 / 4))


def test_the_accuracy_of_no_pairs_is_nan() -> None:
    """The share of no margins is NaN, not 0."""
    assert math.isnan(Share.of([]).value)


@pytest.mark.parametrize("margin", [math.nan, math.inf])
def test_rewards_that_are_not_finite_have_no_accuracy(margin: float) -> None:
    """A model that gives NaN is not one that is always wrong: no share is stated, and the line says why."""
    pairs = [PreferencePair("How?", "So it is done.", "No.", id=str(number)) for number in range(2)]

    found = measure(pairs, np.array([margin, 1.0]), np.array([0.0, 0.0]))

    assert math.isnan(found.accuracy.value)
    assert describe("few", found) == "few: no accuracy, since not all rewards of the 2 pairs are finite"


def test_rewards_come_back_in_input_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches by length do not change the order: each reward equals that of the sequence alone."""
    monkeypatch.setattr(evaluation, "MAX_BATCH_TOKENS", 64)
    folder = write_tiny_checkpoint(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences = [tuple(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]

    batched = rewards(model, sequences)

    with torch.inference_mode():
        alone = [model(input_ids=torch.tensor([sequence])).logits.item() for sequence in sequences]
    assert batched.tolist() == pytest.approx(alone, abs=1e-5)


def test_contrast_families_are_evaluated_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--contrast`` prints a line for the pairs and one for each family; the longer answer never wins if repeated."""
    folder = write_tiny_checkpoint(tmp_path / "model")
    answers = [f"Answer {number} says that thing number {number} is blue. It is also round." for number in range(6)]
    rows = [{"prompt": f"What is thing {n}?", "chosen": answer, "rejected": "No."} for n, answer in enumerate(answers)]

    assert evaluation.main([str(folder), str(write_pairs(tmp_path / "dev.jsonl", rows)), "--contrast", "3"]) == 0

    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == [
        "dev.jsonl",
        *(f"dev.jsonl, contrast {family}" for family in FAMILIES),
    ]
    assert all("on 3 pairs" in line for line in lines[1:])
    assert "longer answer wins 0.0% ± 0.0%" in next(line for line in lines if "repeated" in line)


def test_swapped_labels_reverse_the_accuracy(tmp_path: Path) -> None:
    """Swapping chosen and rejected turns accuracy a into 1 - a, and does not change the correlation with length."""
    folder = write_tiny_checkpoint(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = list(pairwise(SENTENCES))
    pairs = tokenize_pairs([PreferencePair("Hm?", chosen, rejected) for chosen, rejected in texts], tokenizer)
    swapped = tokenize_pairs([PreferencePair("Hm?", rejected, chosen) for chosen, rejected in texts], tokenizer)

    original, reversed_ = evaluate(model, pairs), evaluate(model, swapped)

    assert original.num_pairs == len(texts)
    assert original.longer_wins.value == sum(len(a) > len(b) for a, b in texts) / len(texts)
    assert original.accuracy.value == pytest.approx(1 - reversed_.accuracy.value)
    assert original.mean_margin == pytest.approx(-reversed_.mean_margin)
    assert original.within_pairs_correlation == pytest.approx(reversed_.within_pairs_correlation)
    assert original.log_length_correlation == pytest.approx(reversed_.log_length_correlation)
    assert f"accuracy {original.accuracy.value:.1%}" in describe("rows.jsonl", original)
