"""Linear layers in int8 on a CPU: weights and states in groups of 32 numbers, each group by a scale of its own.

The kernels multiply integers; what they compute is written down here once more in torch, for plain transformers to run
with it when a path is held against it. A group's scale is its largest magnitude over 127 (block-wise quantization,
Dettmers et al., arXiv 2110.02861), so a channel that towers above the rest coarsens its own group alone, no texts are
needed to calibrate anything, and what a token becomes depends on that token only. Embeddings stay as they are, and the
head is not part of the body.
"""

from __future__ import annotations

import torch
from torch import nn

from service.errors import SettingsError

GROUP = 32
"""Neighbouring numbers that share a scale. The demo model on 100 texts of HH-RLHF, Spearman to fp32: 0.9975 with 32,
0.9959 with 64, 0.9905 with 128, 0.9723 with a whole row."""

LARGEST = 127


def grouped(numbers: torch.Tensor) -> torch.Tensor:
    """Return what is left of numbers [..., width], float32, after a way through int8; width is a multiple of 32."""
    groups = numbers.float().reshape(*numbers.shape[:-1], -1, GROUP)
    tops = groups.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(tops > 0, LARGEST / tops, 0.0)
    return (torch.round(groups * inverse) * (tops / LARGEST)).flatten(-2)


class Int8Linear(nn.Linear):
    """A linear layer that multiplies what int8 leaves of its weight and of its input.

    A linear layer becomes one by ``quantize_int8``, which keeps its weight.
    """

    left_of_weight: torch.Tensor

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] of states [..., width], in their dtype."""
        product = nn.functional.linear(grouped(states), self.left_of_weight)
        bias: torch.Tensor | None = self._parameters["bias"]  # torch's stubs deny that `bias` may be None
        return (product if bias is None else product + bias.float()).to(states.dtype)


def layers_for_int8(body: nn.Module) -> list[nn.Linear]:
    """Return the layers of a model's body that are quantized: plain linear ones whose width suits."""
    return [module for module in body.modules() if type(module) is nn.Linear and module.in_features % GROUP == 0]


def quantize_int8(body: nn.Module) -> int:
    """Let the linear layers of a body multiply in int8; return their number.

    Weights take three times their memory until they are packed and dropped.

    Raises:
        SettingsError: it has no layer that suits.
    """
    layers = layers_for_int8(body)
    if not layers:
        raise SettingsError(f"model.quantization is int8, but no layer has a width that is a multiple of {GROUP}")
    for layer in layers:
        layer.__class__ = Int8Linear  # the same layer with another forward
        layer.left_of_weight = grouped(layer.weight.detach())
    return len(layers)
