"""Configurations that trainers leave behind are read as what they compute, or refused with one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_classifiers import load_tiny, packed_path, probe_and_choose, random_rows
from tiny_models import tiny_tokenizer, write_tiny_checkpoint
from transformers import (
    BloomConfig,
    BloomForSequenceClassification,
    CanineConfig,
    CanineForSequenceClassification,
    XmodConfig,
    XmodForSequenceClassification,
)

from service.checkpoints.checkpoint import open_checkpoint
from service.engines.parity import plain_rewards
from service.errors import CheckpointError, ParityError
from service.settings import ModelSettings


def edited(folder: Path, **entries: Any) -> Path:
    """A tiny checkpoint with other entries in its configuration."""
    write_tiny_checkpoint(folder)
    content = json.loads((folder / "config.json").read_bytes()) | entries
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def opened(folder: Path) -> None:
    open_checkpoint(folder, ModelSettings(path=str(folder)))


HARMLESS: list[dict[str, Any]] = [
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation": "flash_attention_2"},
    {"dtype": "torch.float32"},
    {"dtype": "auto"},
    {"torch_dtype": "auto"},
    {"quantization_config": None},
]


@pytest.mark.parametrize("entries", HARMLESS, ids=[str(entries) for entries in HARMLESS])
def test_how_a_trainer_ran_the_model_does_not_matter(entries: dict[str, Any], tmp_path: Path) -> None:
    """An attention of another environment, a notation of a dtype or an empty quantization change no reward."""
    plain = load_tiny(write_tiny_checkpoint(tmp_path / "plain"))
    rows = random_rows(plain)

    folder = edited(tmp_path / "edited", **entries)
    opened(folder)

    assert packed_path(load_tiny(folder)).run(rows).rewards == packed_path(plain).run(rows).rewards


REFUSED: dict[str, dict[str, Any]] = {
    r"has pad_token_id 5000, but the embedding has \d+ rows": {"pad_token_id": 5000},
    "has a rope_scaling whose type is null": {"rope_scaling": {"type": None}},
    "has the dtype 'fp99', which torch does not have": {"dtype": "fp99"},
}


@pytest.mark.parametrize(("refusal", "entries"), REFUSED.items(), ids=[str(entries) for entries in REFUSED.values()])
def test_a_value_that_cannot_be_used_is_named(refusal: str, entries: dict[str, Any], tmp_path: Path) -> None:
    """The sentence has the entry; no error of transformers or torch comes through."""
    with pytest.raises(CheckpointError, match=refusal):
        opened(edited(tmp_path, **entries))


def test_a_model_without_a_limit_on_positions_is_served(tmp_path: Path) -> None:
    """Bloom has ALiBi and no ``max_position_embeddings``; its rewards are those of plain transformers."""
    shape: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = BloomForSequenceClassification(BloomConfig(**shape, pad_token_id=0, num_labels=1)).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer("llama").save_pretrained(tmp_path)

    opened(tmp_path)
    classifier = load_tiny(tmp_path)
    rows = random_rows(classifier)
    path, _ = probe_and_choose(classifier)

    with torch.inference_mode():
        expected = [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]
    assert path.run(list(dict.fromkeys(rows))).rewards == pytest.approx(list(dict.fromkeys(expected)), abs=1e-4)


def test_a_model_without_an_input_embedding_is_refused(tmp_path: Path) -> None:
    """Canine reads characters, which its classifier in transformers hashes; the refusal is one sentence."""
    config = CanineConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=1
    )
    CanineForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match="transformers cannot build the canine classifier"):
        opened(tmp_path)


def test_a_model_that_transformers_itself_does_not_run_is_refused(tmp_path: Path) -> None:
    """X-MOD without a default language needs one with every text, which the sentence says."""
    shape: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = XmodConfig(**shape, intermediate_size=64, num_labels=1, pad_token_id=0, languages=["en_XX"])
    XmodForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)

    with pytest.raises(ParityError, match=r"does not run XmodForSequenceClassification .*language unknown"):
        plain_rewards(load_tiny(tmp_path), [(5, 6, 7)])


NORMALISED: dict[str, dict[str, Any]] = {
    r"OpenRLHF returned \(reward - 2\.5\) / 4\.0": {"normalize_reward": True, "mean": 2.5, "std": 4.0},
    r"less its mean \(\[2\.5\]\)": {"do_normalize": True, "score_type": "reward", "mean": [2.5], "var": [16.0]},
    "costs, not rewards": {"score_type": "cost"},
    "sentence-transformers applies torch": {"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}},
}


@pytest.mark.parametrize(("note", "entries"), NORMALISED.items(), ids=[str(entries) for entries in NORMALISED.values()])
def test_what_training_did_to_a_reward_is_noted(note: str, entries: dict[str, Any], tmp_path: Path) -> None:
    """The service gives raw rewards, and says so where the training code gave others."""
    folder = edited(tmp_path, **entries)

    (found,) = open_checkpoint(folder, ModelSettings(path=str(folder))).notes

    assert re.search(note, found)
