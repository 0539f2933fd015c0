"""SiLU in place in gated feed-forward layers: the gate is overwritten instead of copied, with the same results.

On a CPU the intermediate states of a feed-forward layer exceed the caches, and one copy less saves time: 6 percent of a
packed pass of 2,048 tokens (24M parameters, bfloat16, two cores, one comparison).
"""

from __future__ import annotations

from torch import nn
from transformers.activations import SiLUActivation


def gate_in_place(body: nn.Module) -> None:
    """Apply SiLU in place wherever its input is a gate projection, whose output is read by nothing else."""
    for module in body.modules():
        is_gated = isinstance(getattr(module, "gate_proj", None), nn.Linear) and hasattr(module, "up_proj")
        if is_gated and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
            module.act_fn = nn.SiLU(inplace=True)
