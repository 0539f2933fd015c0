"""Pairs of texts with token types have the rewards of plain transformers on the tokenizer's own call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import SENTENCES, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.assembly import assemble
from service.engines.parity import choose_path, plain_outputs, probes_for, reference_of
from service.errors import HttpError, ParityError
from service.offline import score_offline
from service.records import Encoding, Exchange, Item, Score, TextProbe
from service.settings import read_settings

PAIRS = [(SENTENCES[0], SENTENCES[1]), ("a", "b [SEP] c"), ("a [SEP] b", "c"), (SENTENCES[2], ""), ("", SENTENCES[3])]


def served_rewards(folder: Path, **tokenization: object) -> list[float]:
    model = {"path": str(folder), "device": "cpu", "dtype": "float32"}
    served = assemble(read_settings({"model": model, "tokenization": tokenization}))
    items = [Item(Exchange(*pair)) for pair in PAIRS]
    sequences = served.tokenization.encode(items, Encoding())
    assert not any(isinstance(sequence, HttpError) for sequence in sequences)
    outcomes = dict(score_offline(served.scorer.pipeline, sequences))
    scores = [outcomes[index] for index in range(len(items))]
    return [score.reward for score in scores if isinstance(score, Score) and score.reward is not None]


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_pairs_have_the_rewards_of_the_tokenizers_own_call(tmp_path: Path, family: str) -> None:
    """Encoders without a chat template get pairs, with token types where they have embeddings of them."""
    folder = write_tiny_checkpoint(tmp_path / family, family)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def plain(question: str, answer: str) -> float:
        types = family == "bert"
        inputs = tokenizer([question], [answer], return_tensors="pt", return_token_type_ids=types)
        with torch.no_grad():
            return float(model(**inputs).logits[0, 0])

    assert served_rewards(folder) == pytest.approx([plain(*pair) for pair in PAIRS], abs=1e-4)


def test_the_probe_sees_a_text_that_transformers_reads_otherwise(tiny_checkpoint) -> None:
    """A path is refused where the tokenizer's own call gives another text than the one that is served."""
    from tiny_classifiers import load_tiny

    from service.engines.parity import plain_outputs_of_texts
    from service.engines.paths.base import PathSpec

    classifier = load_tiny(tiny_checkpoint("llama"))
    row = tuple(range(10, 40))
    probes = [*probes_for(classifier, 200), row]
    reference = reference_of(classifier, probes, plain_outputs(classifier, probes))
    same, other = ([TextProbe(row, {"input_ids": ids})] for ids in (row, (*row, 3)))

    choose_path(classifier, [PathSpec("packed")], reference.with_texts(plain_outputs_of_texts(classifier, same)))
    with pytest.raises(ParityError):
        choose_path(classifier, [PathSpec("packed")], reference.with_texts(plain_outputs_of_texts(classifier, other)))
