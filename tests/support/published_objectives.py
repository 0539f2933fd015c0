"""Writes a tiny checkpoint of each published layout with several outputs, and says how its head is read.

Where a layout was read stands beside its function; all weights are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from several_outputs import Reading
from tiny_layouts import HIDDEN_SIZE, random, store, store_armo_rm
from transformers import AutoTokenizer

PATTERN = "<|im_end|>\n<|im_start|>assistant\n"
"""What the tiny chat template writes between prompt and completion."""

OBJECTIVES = ("helpful", "correct", "brief")


@dataclass(frozen=True)
class Published:
    """A tiny checkpoint of a published layout."""

    read: Reading
    layout: str
    options: Mapping[str, Any]


def gate_position(folder: Path, ids: list[int]) -> int:
    """The first token of the last occurrence of the pattern, searched as the published models' code does."""
    pattern = AutoTokenizer.from_pretrained(folder)(PATTERN, add_special_tokens=False)["input_ids"]
    return next(j for j in range(len(ids) - len(pattern), -1, -1) if ids[j : j + len(pattern)] == pattern)


def armo_rm(folder: Path) -> Published:
    """``regression_layer``, ``reward_transform_matrix``, and ``gating``: ReLU, softmax at a temperature, a scale.

    RLHFlow/ArmoRM-Llama3-8B-v0.1: ``LlamaForRewardModelWithGating`` of its modeling_custom.py, which many public
    repositories carry. The gate reads the token where the last occurrence of the end of the user turn begins.
    """
    head = store_armo_rm(folder)
    gate = [head[f"gating.layers.{index}.weight"] for index in range(3)]
    biases = [head[f"gating.layers.{index}.bias"] for index in range(3)]
    transform = head["reward_transform_matrix"]

    def read(states: torch.Tensor, ids: list[int]) -> torch.Tensor:
        inner = states[gate_position(folder, ids)]
        for index, (weight, bias) in enumerate(zip(gate, biases, strict=True)):
            inner = weight @ inner + bias
            inner = torch.relu(inner) if index < 2 else inner
        weights = torch.softmax(inner / 2, dim=0) * 1.5
        rewards = head["regression_layer.weight"] @ states[-1]
        return torch.cat([(weights * (rewards @ transform)).sum()[None], rewards])

    return Published(read, "ArmoRM", {"outputs": OBJECTIVES, "gate_pattern": PATTERN})


def qrm(folder: Path) -> Published:
    """ArmoRM's layout with quantiles of each objective, batch normalisation in the gate, and dropout between.

    nicolinho/QRM-Llama3.1-8B-v2 and QRM-Gemma-2-27B, as RewardBench (rewardbench/models/qrm.py) and the index of the
    latter's weights have it: linear layers at 0, 4, 8 and 11, normalisations at 2, 6 and 10.
    """
    norms = {
        f"gating.layers.{index}": torch.nn.BatchNorm1d(16).eval().requires_grad_(requires_grad=False)
        for index in (2, 6)
    }
    for seed, norm in enumerate(norms.values()):
        norm.running_mean = random(16, seed=10 + seed)
        norm.running_var = random(16, seed=12 + seed).abs() + 0.5
        norm.weight.copy_(random(16, seed=14 + seed) + 1)
        norm.bias.copy_(random(16, seed=16 + seed))
    first, second, last = random(16, HIDDEN_SIZE, seed=1), random(16, 16, seed=2), 4 * random(3, 16, seed=3)
    transform = torch.eye(3) - 0.3 * random(3, 3, seed=7).abs()
    head = {
        "regression_layer.weight": random(15, HIDDEN_SIZE, seed=8),
        "reward_transform_matrix": transform,
        "gating.logit_scale": torch.tensor([0.75]),
        "gating.layers.0.weight": first,
        "gating.layers.4.weight": second,
        "gating.layers.7.weight": last,
        "gating.layers.7.bias": random(3, seed=9),
        **{f"{name}.{part}": tensor for name, norm in norms.items() for part, tensor in norm.state_dict().items()},
    }
    store(
        folder,
        head,
        architectures=["LlamaForRewardModelWithGating"],
        num_quantiles=5,
        num_objectives=3,
        gating_temperature=1,
    )

    def read(states: torch.Tensor, ids: list[int]) -> torch.Tensor:
        inner = states[[gate_position(folder, ids)]]
        inner = norms["gating.layers.2"](torch.relu(inner @ first.T))
        inner = norms["gating.layers.6"](torch.relu(inner @ second.T))
        weights = torch.softmax(inner[0] @ last.T + head["gating.layers.7.bias"], dim=0) * 0.75
        quantiles = (head["regression_layer.weight"] @ states[-1]).reshape(3, 5)
        rewards = quantiles.mean(dim=1) @ transform
        return torch.cat([(weights * rewards).sum()[None], rewards])

    return Published(read, "QRM", {"outputs": OBJECTIVES, "gate_pattern": PATTERN})


def urm(folder: Path) -> Published:
    """``score`` with a mean and a deviation per objective, and ``weights.fc`` with SELU on the same state.

    LxzGordon/URM-LLaMa-3.1-8B: ``LlamaForSequenceClassificationWithNormal_Weights``, as SGLang reads it
    (srt/models/llama_classification and llama_reward).
    """
    layers = [random(HIDDEN_SIZE, HIDDEN_SIZE, seed=1), random(HIDDEN_SIZE, HIDDEN_SIZE, seed=2)]
    layers.append(random(5, HIDDEN_SIZE, seed=3))
    biases = [random(HIDDEN_SIZE, seed=4), random(HIDDEN_SIZE, seed=5), random(5, seed=6)]
    head = {
        "score.weight": random(10, HIDDEN_SIZE, seed=8),
        **{f"weights.fc.{2 * index}.weight": weight for index, weight in enumerate(layers)},
        **{f"weights.fc.{2 * index}.bias": bias for index, bias in enumerate(biases)},
    }
    store(folder, head, architectures=["LlamaForSequenceClassificationWithNormal_Weights"])

    def read(states: torch.Tensor, _: list[int]) -> torch.Tensor:
        inner = states[-1]
        for index, (weight, bias) in enumerate(zip(layers, biases, strict=True)):
            inner = weight @ inner + bias
            inner = torch.selu(inner) if index < 2 else inner
        means = (head["score.weight"] @ states[-1]).reshape(5, 2)[:, 0]
        return torch.cat([(inner * means).sum()[None], means])

    return Published(read, "URM", {})


def attribute_model(folder: Path) -> Published:
    """A value head with a row and a bias for each attribute, as multi-attribute training of HelpSteer stores it.

    nvidia/Llama3-70B-SteerLM-RM, model card: nine floats per response, weighted for one reward.
    """
    head = {"v_head.weight": random(3, HIDDEN_SIZE), "v_head.bias": random(3, seed=1)}
    store(folder, head)
    return Published(
        lambda states, _: head["v_head.weight"] @ states[-1] + head["v_head.bias"],
        "Starling",
        {"outputs": OBJECTIVES},
    )


PUBLISHED = (armo_rm, qrm, urm, attribute_model)
