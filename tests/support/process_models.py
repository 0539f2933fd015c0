"""Tiny checkpoints in the layouts of published process reward models, and their step rewards computed independently.

The independent reading is a plain transformers body on the text up to each step, and the head written out here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import SENTENCES, write_tiny_causal_lm
from transformers import AutoModel, AutoTokenizer

PROMPT = "How do I boil an egg?"
STEPS = (
    "Put it into boiling water.",
    "Wait for seven minutes.\nThen cool it.",
    "I am sorry, the sea is old.",
    SENTENCES[4],
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that make a head's output differ by about one from text to text."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[-1])


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor], *, drop: str = "", **config: Any) -> Path:
    stored = {name: value for name, value in load_file(folder / "model.safetensors").items() if name != drop}
    save_file(stored | tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | config))
    return folder


def write_qwen_prm(folder: Path) -> Path:
    """``score`` of two layers with two labels, read at ``<extra_0>``.

    Source: modeling_qwen2_rm.py of Qwen/Qwen2.5-Math-PRM-7B as vllm/model_executor/models/qwen2_rm.py reads it, and
    the model's card: ``<extra_0>`` after each step, in the assistant's turn.
    """
    write_tiny_causal_lm(folder, "qwen2", vocab_size=480, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    tokenizer.save_pretrained(folder)
    head = {
        "score.0.weight": random(64, 64, seed=1),
        "score.0.bias": random(64, seed=2),
        "score.2.weight": 4 * random(2, 64, seed=3),
        "score.2.bias": random(2, seed=4),
    }
    code = {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}
    return _rewrite(folder, head, drop="lm_head.weight", architectures=["Qwen2ForProcessRewardModel"], auto_map=code)


def write_skywork_prm(folder: Path) -> Path:
    """``v_head.summary`` with a bias, read at the line break after each step.

    Source: github.com/SkyworkAI/skywork-o1-prm-inference, as openreasoner/openr holds it: prm_model.py (``ValueHead``,
    sigmoid) and io_utils.py (``prepare_input``: each step is encoded alone, and the token of the line break follows).
    """
    write_tiny_causal_lm(folder, "qwen2")
    return _rewrite(
        folder, {"v_head.summary.weight": 2 * random(1, 64, seed=5), "v_head.summary.bias": random(1, seed=6)}
    )


def write_math_shepherd(folder: Path) -> Path:
    """A language model whose logits of + and - are read at the last token of a marker.

    Source: the card of peiyi9979/math-shepherd-mistral-7b-prm, as openreasoner/openr runs it: ``question output``, the
    marker after each step, softmax over the logits of the two tokens at the marker's token.
    """
    write_tiny_causal_lm(folder, "mistral", vocab_size=480, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["\u043a\u0438"])
    tokenizer.save_pretrained(folder)
    return folder


def qwen_text(steps: Sequence[str]) -> str:
    """The text of the card: the steps with ``<extra_0>`` after each in the assistant's turn."""
    completion = "".join(f"{step}<extra_0>" for step in steps)
    return f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"


@torch.inference_mode()
def states_at(folder: Path, ids: Sequence[int], positions: Sequence[int]) -> list[torch.Tensor]:
    """The last state of a plain body on the ids up to each position."""
    body = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return [body(torch.tensor([ids[: position + 1]])).last_hidden_state[0, -1] for position in positions]


def qwen_rewards(source: Path, plain: Path, steps: Sequence[str]) -> list[list[float]]:
    """[step][label]: the logits at each marker.

    Args:
        source: in the published layout.
        plain: a folder that transformers loads the body from.
        steps: of the completion.
    """
    ids = AutoTokenizer.from_pretrained(source)(qwen_text(steps))["input_ids"]
    marker = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<extra_0>")
    head = load_file(source / "model.safetensors")
    logits = []
    for state in states_at(plain, ids, [index for index, one in enumerate(ids) if one == marker]):
        hidden = torch.relu(head["score.0.weight"] @ state + head["score.0.bias"])
        logits.append((head["score.2.weight"] @ hidden + head["score.2.bias"]).tolist())
    return logits


def skywork_rewards(source: Path, plain: Path, steps: Sequence[str]) -> list[float]:
    """[step]: the probability at the line break after each step, each encoded alone."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer((tokenizer.bos_token or "") + PROMPT + "\n")["input_ids"]
    positions = []
    for step in steps:
        ids = [*ids, *tokenizer(step)["input_ids"], tokenizer("\n")["input_ids"][-1]]
        positions.append(len(ids) - 1)
    head = load_file(source / "model.safetensors")
    logits = [
        head["v_head.summary.weight"][0] @ state + head["v_head.summary.bias"][0]
        for state in states_at(plain, ids, positions)
    ]
    return [torch.sigmoid(logit).item() for logit in logits]
