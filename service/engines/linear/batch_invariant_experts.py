"""Experts of a mixture on a CPU whose result for a token does not depend on the other tokens of the pass.

How many tokens an expert gets depends on the batch, and a CPU library chooses the order of additions by that number.
Here an expert multiplies blocks of one fixed number of rows only, the last one padded with zeros. transformers marks
the modules that hold all experts of a layer; those are changed, and no weight is copied.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

BLOCK_ROWS = 64
"""Rows of each product. More would waste work where an expert gets few tokens, fewer would read weights more often."""


def set_batch_invariant_experts(body: nn.Module, *, enabled: bool) -> None:
    """Let all experts of a model multiply in blocks of one size, or as transformers does."""
    for module in body.modules():
        if not _holds_experts(module):
            continue
        module.__dict__.pop("forward", None)
        if enabled:
            module.forward = MethodType(batch_invariant_experts, module)


def _holds_experts(module: nn.Module) -> bool:
    """Whether transformers' decorator ``use_experts_implementation`` describes the module's weights."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj"))


def batch_invariant_experts(
    experts: Any, states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, [tokens, hidden].

    Args:
        experts: a module of transformers with the weights of all experts, [experts, out, in] or transposed.
        states: [tokens, hidden].
        expert_ids: the experts of each token, [tokens, top k].
        expert_weights: their weights, [tokens, top k].
    """
    outputs = states.new_empty(*expert_ids.shape, states.shape[-1])
    for expert in torch.unique(expert_ids).tolist():
        tokens, places = torch.where(expert_ids == expert)
        outputs[tokens, places] = _run_expert(experts, expert, states[tokens])
    return (outputs * expert_weights[..., None]).sum(dim=1).to(states.dtype)


def _run_expert(experts: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _multiply(experts, name, expert, rows)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)  # noqa: SLF001 - the decorator's
    output = _multiply(experts, "down_proj", expert, inner)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _multiply(experts: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    weight = weight.T if experts.is_transposed else weight
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    num_padding = -len(rows) % BLOCK_ROWS
    blocks = torch.split(pad(rows, (0, 0, 0, num_padding)), BLOCK_ROWS)
    return torch.cat([linear(block, weight, bias) for block in blocks])[: len(rows)]
