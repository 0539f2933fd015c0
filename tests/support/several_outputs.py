"""Scores texts with a checkpoint whose head has several outputs, and computes what a reading expects of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import SENTENCES
from transformers import AutoModel, AutoTokenizer

from service.assembly import ServedModel, assemble
from service.offline import encode_items, score_offline
from service.records import Encoding, Exchange, Item, Score
from service.settings import read_settings

PAIRS = [(prompt, completion) for prompt in SENTENCES[:3] for completion in SENTENCES[3:]]

Reading = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""From the last states [tokens, hidden] and the token ids of a text to its outputs."""


def served(folder: Path, **model: Any) -> ServedModel:
    """The parts that serve a checkpoint in fp32 on the CPU."""
    settings = read_settings({"model": {"path": str(folder), "device": "cpu", "dtype": "float32"} | model})
    return assemble(settings, taps=())


def scores_of(parts: ServedModel, pairs: Sequence[tuple[str, str]], batch: int = 64) -> list[Score]:
    """The scores of exchanges, in order, from batches of at most this many sequences."""
    encoded = list(encode_items(parts.tokenization, [Item(Exchange(*pair)) for pair in pairs], Encoding()))
    results = dict(score_offline(parts.scorer.pipeline, encoded, max_batch_sequences=batch, advance=lambda _: None))
    scores = [results[index] for index in range(len(pairs))]
    assert all(isinstance(score, Score) for score in scores), scores
    return scores  # type: ignore[return-value]


@torch.no_grad()
def expected_outputs(plain: Path, read: Reading, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[list[float]]:
    """The reading of the states that plain transformers gives for the text of the chat template."""
    body, tokenizer = AutoModel.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    outputs = []
    for prompt, completion in pairs:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        outputs.append(read(body(torch.tensor([ids])).last_hidden_state[0], ids).tolist())
    return outputs
