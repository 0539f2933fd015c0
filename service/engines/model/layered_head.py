"""A described head: linear layers with activations on the state of one token, in fp32.

Its rewards do not depend on the number of states: each state is multiplied alone, by products of one fixed shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from service.checkpoints.quantized_weights import read_in_float32
from service.checkpoints.reward_description import LayeredHead, LinearLayer
from service.records import Activation

ACTIVATIONS: Mapping[Activation, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class LayeredHeadModule(nn.Sequential):
    """The layers of a head; its parameters are float32.

    Args:
        head: the description.
        tensors: the stored tensors that it names.
    """

    def __init__(self, head: LayeredHead, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(*(module for layer in head.layers for module in _modules_of(layer, tensors)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., outputs] of states [..., hidden] of any float type."""
        states = states.float()
        for module in self:
            states = module(states)
        return states


def _modules_of(layer: LinearLayer, tensors: Mapping[str, torch.Tensor]) -> list[nn.Module]:
    weight = tensors[layer.weight].float()
    bias = None if layer.bias is None else tensors[layer.bias].float()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return [linear] if layer.activation == "none" else [linear, activation_module(layer.activation)]


def activation_module(name: Activation) -> nn.Module:
    """Return the module of an activation."""
    return nn.GELU(approximate="tanh") if name == "gelu_tanh" else ACTIVATIONS[name]()


def load_layered_head(folder: Path, head: LayeredHead) -> LayeredHeadModule:
    """Read the tensors of a validated head from the weight files of a checkpoint folder, in fp32, on the CPU."""
    return LayeredHeadModule(head, read_in_float32(folder, head.tensor_names()))
