"""Tiny checkpoints whose head gives two named outputs, and the outputs by a head that is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_checkpoint
from transformers import AutoModel, AutoTokenizer

from service.checkpoints.reward_description import (
    LayeredHead,
    LinearLayer,
    RewardDescription,
    WeightedSum,
    write_description,
)

OUTPUTS = ("helpfulness", "brevity")
WEIGHTS = {"helpfulness": 0.75, "brevity": -0.5}


def write_two_outputs(
    folder: Path, *, weights: Mapping[str, float] | None = None, outputs: Sequence[str] = OUTPUTS, seed: int = 0
) -> Path:
    """Write a tiny decoder whose head is one linear layer with an output for each name; return the folder.

    Args:
        folder: to write.
        weights: of the weighted sum in ``reward_model.json``; None: it has none.
        outputs: names of the outputs.
        seed: of the random weights.
    """
    write_tiny_checkpoint(folder, seed=seed)
    tensors = load_file(folder / "model.safetensors")
    width = tensors.pop("score.weight").shape[1]
    generator = torch.Generator().manual_seed(seed)
    tensors["head.weight"] = torch.randn(len(outputs), width, generator=generator) / width**0.5
    tensors["head.bias"] = torch.randn(len(outputs), generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    combine = None if weights is None else WeightedSum(dict(weights))
    head = LayeredHead((LinearLayer("head.weight", "head.bias"),))
    write_description(folder, RewardDescription(head, outputs=tuple(outputs), combine=combine))
    return folder


@torch.inference_mode()
def expected_outputs(folder: Path, texts: Sequence[str]) -> list[list[float]]:
    """Return [text][output] by a plain transformers body, one text at a time, and the head's own tensors."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / "model.safetensors")
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        state = body(ids).last_hidden_state[0, -1]
        found.append((tensors["head.weight"] @ state + tensors["head.bias"]).tolist())
    return found


def weighted_sum(outputs: Sequence[float], weights: Mapping[str, float], names: Sequence[str] = OUTPUTS) -> float:
    """The reward by the weights; an output without one counts zero."""
    return sum(weights.get(name, 0.0) * value for name, value in zip(names, outputs, strict=True))
