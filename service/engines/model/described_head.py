"""A described head: what `service.checkpoints.described_heads` names, computed in fp32 from states of single tokens.

Its outputs do not depend on the number of states: on a CPU each state is multiplied alone, by products of one fixed
shape, and on a GPU the caller passes a function that fixes the order of additions. What is between the layers is
elementwise, or a sum in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from service.checkpoints.described_heads import (
    DescribedHead,
    EnsembleHead,
    Gate,
    GatedHead,
    LayeredHead,
    LinearLayer,
)
from service.checkpoints.quantized_weights import read_in_float32
from service.engines.model.scalar_head import tree_sums
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

Apply: TypeAlias = Callable[[torch.Tensor, nn.Sequential], torch.Tensor]
"""Runs layers that end in a linear one on float32 states [rows, inputs]."""

Tensors: TypeAlias = Mapping[str, torch.Tensor]


def apply_layers(states: torch.Tensor, layers: nn.Sequential) -> torch.Tensor:
    """Run the layers as torch does: on one state, or where the number of states may change the last bits."""
    outputs: torch.Tensor = layers(states)
    return outputs


class LayeredHeadModule(nn.Module):
    """The layers of a head; its parameters are float32.

    Args:
        head: the description.
        tensors: the stored tensors that it names.
    """

    def __init__(self, head: LayeredHead, tensors: Tensors) -> None:
        super().__init__()
        self.layers = layers_of(head.layers, tensors)
        self._softcap = head.softcap

    def forward(
        self, states: torch.Tensor, gate_states: torch.Tensor | None = None, apply: Apply = apply_layers
    ) -> torch.Tensor:
        """Return float32 [rows, outputs].

        Args:
            states: those of the tokens that are read, [rows, hidden], of any float type.
            gate_states: not read.
            apply: runs linear layers.
        """
        del gate_states
        outputs = apply(states.float(), self.layers)
        return outputs if self._softcap is None else self._softcap * torch.tanh(outputs / self._softcap)


class GatedHeadModule(nn.Module):
    """Objectives and the gate that weights them; its parameters are float32.

    Args:
        head: the description.
        tensors: the stored tensors that it names.
    """

    def __init__(self, head: GatedHead, tensors: Tensors) -> None:
        super().__init__()
        self.objectives = layers_of([head.objectives], tensors)
        self.gate = layers_of(head.gate.layers, tensors)
        self.transform = None if head.transform is None else nn.Sequential(_linear(tensors[head.transform].T, None))
        self._rule = head.gate

    @property
    def token_pattern(self) -> tuple[int, ...]:
        """Token ids of which the gate reads the first one; empty: it reads the pooled token."""
        return self._rule.token_pattern

    def forward(
        self, states: torch.Tensor, gate_states: torch.Tensor | None = None, apply: Apply = apply_layers
    ) -> torch.Tensor:
        """Return float32 [rows, 1 + objectives]: the gated sum, then the objectives.

        Args:
            states: those of the tokens that are read, [rows, hidden], of any float type.
            gate_states: those that the gate reads, [rows, hidden]; None: it reads the same ones.
            apply: runs linear layers.
        """
        objectives = apply(states.float(), self.objectives)
        adjusted = objectives if self.transform is None else apply(objectives, self.transform)
        gate = apply((states if gate_states is None else gate_states).float(), self.gate)
        weights = _normalized(gate, self._rule)
        return torch.cat([tree_sums(weights * adjusted), objectives], dim=-1)


class EnsembleHeadModule(nn.Module):
    """Several heads on the same states; its parameters are float32.

    Args:
        head: the description.
        tensors: the stored tensors that it names.
    """

    def __init__(self, head: EnsembleHead, tensors: Tensors) -> None:
        super().__init__()
        self.members = nn.ModuleList(LayeredHeadModule(member, tensors) for member in head.members)

    def forward(
        self, states: torch.Tensor, gate_states: torch.Tensor | None = None, apply: Apply = apply_layers
    ) -> torch.Tensor:
        """Return float32 [rows, members]; see ``LayeredHeadModule.forward``."""
        return torch.cat([member(states, gate_states, apply) for member in self.members], dim=-1)


StateHead: TypeAlias = LayeredHeadModule | GatedHeadModule | EnsembleHeadModule
"""A head on the states of single tokens that is not one linear layer."""

STATE_HEADS = (LayeredHeadModule, GatedHeadModule, EnsembleHeadModule)


def _log_sum(values: torch.Tensor) -> torch.Tensor:
    """Return [rows, 1], the logarithm of the sum of exponentials; each row's bits depend on that row alone."""
    largest = values.amax(dim=-1, keepdim=True)
    return largest + tree_sums((values - largest).exp()).log()


def _normalized(gate: torch.Tensor, rule: Gate) -> torch.Tensor:
    scaled = gate / rule.temperature
    weights = (scaled - _log_sum(scaled)).exp() if rule.normalization == "softmax" else scaled
    return weights * rule.scale


def layers_of(layers: tuple[LinearLayer, ...] | list[LinearLayer], tensors: Tensors) -> nn.Sequential:
    """Return the modules of linear layers and their activations, in float32."""
    modules: list[nn.Module] = []
    for layer in layers:
        modules.append(_linear(tensors[layer.weight], None if layer.bias is None else tensors[layer.bias]))
        if layer.activation != "none":
            modules.append(activation_module(layer.activation))
    return nn.Sequential(*modules)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.float().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.float())
    return linear


def activation_module(name: Activation) -> nn.Module:
    """Return the module of an activation."""
    return nn.GELU(approximate="tanh") if name == "gelu_tanh" else ACTIVATIONS[name]()


def head_module(head: DescribedHead, tensors: Tensors) -> StateHead:
    """Return the module of a described head."""
    if isinstance(head, LayeredHead):
        return LayeredHeadModule(head, tensors)
    return GatedHeadModule(head, tensors) if isinstance(head, GatedHead) else EnsembleHeadModule(head, tensors)


def load_head(folder: Path, head: DescribedHead) -> StateHead:
    """Read the tensors of a validated head from the weight files of a checkpoint folder, in fp32, on the CPU."""
    return head_module(head, read_in_float32(folder, head.tensor_names()))
