"""Tiny random PEFT adapters with a scalar head, as PEFT itself saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

HEAD = "base_model.model.score.weight"
"""Name of the head's tensor in the adapter's file."""


def write_adapter(folder: Path, base: Path, *, seed: int = 1) -> Path:
    """Write a LoRA adapter for the base with random weights; PEFT's initial weights would change nothing."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "down_proj"]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1 if "lora" in name else 1.0)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder
