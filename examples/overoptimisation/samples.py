"""Completions of the initial policy, the pairs that gold rewards make of them, and the body of the proxy."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.ppo.ppo import Policy

SAMPLING_BATCH = 96
"""Completions that are sampled at once."""


def sample(path: Path, prompts: Sequence[str], count: int, *, policy: Policy, folder: str, max_tokens: int) -> None:
    """Write ``count`` completions of each prompt, one row each, after the rows that the file has already."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_done = len(read_rows(path)) if path.exists() else 0
    waiting = [prompt for prompt in prompts for _ in range(count)][num_done:]
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), SAMPLING_BATCH):
            batch = waiting[start : start + SAMPLING_BATCH]
            conversations = [[{"role": "user", "content": prompt}] for prompt in batch]
            completions = policy.sample(tokenizer, conversations, max_tokens).completions
            rows = ({"prompt": prompt, "completion": text} for prompt, text in zip(batch, completions, strict=True))
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()


def labelled_pairs(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Return every pair of completions of a prompt, the one with the higher reward chosen; ties are left out."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["prompt"]].append(row)
    pairs = []
    for prompt, group in groups.items():
        for one, other in itertools.combinations(group, 2):
            worse, better = sorted((one, other), key=lambda row: row["reward"])
            if better["reward"] > worse["reward"] and better["completion"] != worse["completion"]:
                pairs.append({"prompt": prompt, "chosen": better["completion"], "rejected": worse["completion"]})
    return pairs


def write_first_blocks(policy: str, folder: Path, count: int) -> None:
    """Write the causal language model that has only the first ``count`` blocks of the policy, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    model.base_model.layers = model.base_model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
