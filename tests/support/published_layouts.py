"""Writes a tiny checkpoint of each published layout with one reward, and says how its head is read.

Where a layout was read stands beside its function; all weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_layouts import HIDDEN_SIZE, Tensors, random, store


def linear(weight: torch.Tensor, bias: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reading of a head of one layer."""
    return lambda state: (weight[0] * state).sum() + bias


def two_layers(
    tensors: Tensors, first: str, last: str, activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reading of a head of two layers."""

    def read(state: torch.Tensor) -> torch.Tensor:
        inner = activation(tensors[f"{first}.weight"] @ state + tensors[f"{first}.bias"])
        return tensors[f"{last}.weight"][0] @ inner + tensors[f"{last}.bias"][0]

    return read


@dataclass(frozen=True)
class Published:
    """A tiny checkpoint of a published layout."""

    read: Callable[[torch.Tensor], torch.Tensor]
    """The reward of a last hidden state."""

    layout: str
    pooling: str = "last"

    appended: tuple[int, ...] = ()
    """Token ids after the text."""


def starling(folder: Path) -> Published:
    """The body as ``transformer`` and ``v_head`` without a bias.

    berkeley-nest/Starling-RM-7B-alpha, model card: ``GPTRewardModel`` reads the state before the first pad token.
    """
    head = {"v_head.weight": random(1, HIDDEN_SIZE)}
    store(folder, head, rename=lambda name: name.replace("model.", "transformer.", 1))
    return Published(linear(head["v_head.weight"]), "Starling")


def ultra_rm(folder: Path) -> Published:
    """``regression_head`` without a bias, read at the last attended token.

    openbmb/UltraRM-13b, model card: ``LlamaRewardModel``; openbmb/Eurus-RM-7b has the same head on Mistral.
    """
    head = {"regression_head.weight": random(1, HIDDEN_SIZE)}
    store(folder, head, architectures=["LlamaRewardModel"])
    return Published(linear(head["regression_head.weight"]), "UltraRM")


def beaver(folder: Path) -> Published:
    """``score_head`` with a bias, read at the last attended token, and a normalizer that the service leaves out.

    PKU-Alignment/beaver-7b-v1.0-reward: safe_rlhf/models/score_model.
    """
    head = {"score_head.weight": random(1, HIDDEN_SIZE), "score_head.bias": torch.tensor([0.5])}
    normalizer = {
        "normalizer.mean": torch.ones(1),
        "normalizer.var": torch.ones(1),
        "normalizer.count": torch.tensor(9),
    }
    store(
        folder,
        head | normalizer,
        architectures=["LlamaForScore"],
        do_normalize=True,
        score_type="reward",
        mean=[2.5],
        var=[4.0],
    )
    return Published(linear(head["score_head.weight"], 0.5), "Beaver")


def open_assistant(folder: Path) -> Published:
    """``out_proj`` with a bias, and ``pooling`` last in the configuration.

    OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1: ``GPTNeoXRewardModel`` of model_training/models/reward_model.py.
    """
    head = {"out_proj.weight": random(1, HIDDEN_SIZE), "out_proj.bias": torch.tensor([-0.25])}
    store(
        folder,
        head,
        family="gpt_neox",
        architectures=["GPTNeoXRewardModel"],
        model_type="gpt_neox_reward_model",
        pooling="last",
    )
    return Published(linear(head["out_proj.weight"], -0.25), "OpenAssistant")


def internlm2(folder: Path) -> Published:
    """Fused ``wqkv`` grouped by key-value head, and ``v_head`` read at a reward token that is appended to every text.

    internlm/internlm2-7b-reward: ``InternLM2ForRewardModel`` of modeling_internlm2.py.
    """
    head = {"v_head.weight": random(1, HIDDEN_SIZE)}
    store(
        folder,
        head,
        architectures=["InternLM2ForRewardModel"],
        model_type="internlm2",
        reward_token_id=3,
        auto_map={"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
    )
    weights = load_file(folder / "model.safetensors")
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
    }
    for layer in range(3):
        query, key, value = (weights.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv")
        rows = []
        for group in range(2):  # two key-value heads of 16 rows, each for two query heads
            rows += [query[32 * group : 32 * group + 32], key[16 * group :][:16], value[16 * group :][:16]]
        weights[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    for ours, theirs in names.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return Published(linear(head["v_head.weight"]), "InternLM2", appended=(3,))


def qwen_math_rm(folder: Path) -> Published:
    """``score`` is linear, ReLU, linear, pooled as transformers does.

    Qwen/Qwen2.5-Math-RM-72B: modeling_qwen2_rm.py, as vLLM reads it (qwen2_rm.py).
    """
    head = {
        "score.0.weight": random(HIDDEN_SIZE, HIDDEN_SIZE, seed=1),
        "score.0.bias": random(HIDDEN_SIZE, seed=2),
        "score.2.weight": 3 * random(1, HIDDEN_SIZE, seed=3),
        "score.2.bias": torch.tensor([0.125]),
    }
    code = {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}
    store(folder, head, family="qwen2", architectures=["Qwen2ForRewardModel"], auto_map=code)
    return Published(two_layers(head, "score.0", "score.2"), "Qwen2ForRewardModel", "hf")


def inf_orm(folder: Path) -> Published:
    """``score`` is linear, ReLU, linear to ``num_labels``.

    infly/INF-ORM-Llama3.1-70B, model card: ``INFORMForSequenceClassification``.
    """
    head = {
        "score.0.weight": random(HIDDEN_SIZE, HIDDEN_SIZE, seed=1),
        "score.0.bias": random(HIDDEN_SIZE, seed=2),
        "score.2.weight": 3 * random(1, HIDDEN_SIZE, seed=3),
        "score.2.bias": torch.tensor([-1.0]),
    }
    store(folder, head, architectures=["INFORMForSequenceClassification"])
    return Published(two_layers(head, "score.0", "score.2"), "INF-ORM", "hf")


def grm(folder: Path) -> Published:
    """``v_head.summary`` is a sequence of linear layers of ``num_neurons`` with ReLU, and a last one.

    Ray2333/GRM-*, model cards: ``GRewardModel`` and its ``ValueHead``.
    """
    head = {
        "v_head.summary.0.weight": random(24, HIDDEN_SIZE, seed=1),
        "v_head.summary.0.bias": random(24, seed=2),
        "v_head.summary.2.weight": 3 * random(1, 24, seed=3),
        "v_head.summary.2.bias": torch.tensor([0.5]),
    }
    store(folder, head, architectures=["LlamaForCausalLM"], without_lm_head=False)
    return Published(two_layers(head, "v_head.summary.0", "v_head.summary.2"), "GRM")


def token_classifier(folder: Path) -> Published:
    """A token classifier with one label has a bias, which a sequence classifier has not.

    verl and AReaL save transformers' own AutoModelForTokenClassification.
    """
    head = {"score.weight": random(1, HIDDEN_SIZE), "score.bias": torch.tensor([3.0])}
    store(folder, head, architectures=["LlamaForTokenClassification"], num_labels=1)
    return Published(linear(head["score.weight"], 3.0), "token classifier")


def compiled(folder: Path) -> Published:
    """torch.compile under DDP puts two prefixes before all names."""
    head = {"module._orig_mod.score.weight": random(1, HIDDEN_SIZE)}
    store(folder, head, rename=lambda name: f"module._orig_mod.{name}", num_labels=1)
    return Published(linear(head["module._orig_mod.score.weight"]), "transformers", "hf")


PUBLISHED = (
    starling,
    ultra_rm,
    beaver,
    open_assistant,
    internlm2,
    qwen_math_rm,
    inf_orm,
    grm,
    token_classifier,
    compiled,
)
