"""Tiny checkpoints in the layouts of published reward models: a random body with a head of other tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_causal_lm

HIDDEN_SIZE = 64

Tensors = Mapping[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that make a head's output differ by about one from text to text."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[-1])


def store(
    folder: Path,
    head: Tensors,
    *,
    family: str = "llama",
    rename: Callable[[str], str] = lambda name: name,
    without_lm_head: bool = True,
    **config: Any,
) -> None:
    """Write a causal language model with this head, these names in its body and these entries in its config.

    The body with transformers' names is written beside it, for the reading.
    """
    write_tiny_causal_lm(folder.with_name("plain"), family)
    write_tiny_causal_lm(folder, family)
    weights = {
        rename(name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not (without_lm_head and name.startswith("lm_head."))
    }
    save_file({**weights, **head}, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_bytes()) | config
    (folder / "config.json").write_text(json.dumps(content))


def store_armo_rm(folder: Path) -> Tensors:
    """Write a model with ArmoRM's head: three objectives, and a gate of three layers at a temperature of 2."""
    widths = [(24, HIDDEN_SIZE), (24, 24), (3, 24)]
    head = {
        "regression_layer.weight": random(3, HIDDEN_SIZE, seed=8),
        "reward_transform_matrix": torch.eye(3) - 0.3 * random(3, 3, seed=7).abs(),
        "gating.logit_scale": torch.tensor([1.5]),
        **{f"gating.layers.{index}.weight": 3 * random(*shape, seed=index) for index, shape in enumerate(widths)},
        **{f"gating.layers.{index}.bias": random(shape[0], seed=4 + index) for index, shape in enumerate(widths)},
    }
    store(
        folder,
        head,
        architectures=["LlamaForRewardModelWithGating"],
        num_objectives=3,
        gating_temperature=2,
        auto_map={"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
    )
    return head
