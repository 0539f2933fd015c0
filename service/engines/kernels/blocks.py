"""Blocks of a decoder in two strokes around attention, each of them in a core's cache for some rows at a time.

It fits blocks that add attention and a gated feed-forward layer, each behind a norm, to what passes through (Llama and
its kin). Whether a block is one is found out by trying it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from service.engines.kernels.bindings import Kernels, PackedGates, RmsNorm
from service.engines.kernels.fused_modules import (
    KernelForward,
    activation_of,
    agree,
    can_be_packed,
    gates_of,
    norm_of,
    pack_gates,
    pack_layer,
    plain_forward,
    trial_states,
)

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
"""What transformers' families call the layers that make queries, keys and values."""


class FusedDecoderBlock(KernelForward):
    """A block whose linear layers, norms, gate and residuals run for some rows at a time, but for attention.

    What comes in is overwritten: in a model each block's states are the next one's alone.
    """

    def __init__(
        self,
        module: Any,
        norms: tuple[RmsNorm, RmsNorm],
        projections: tuple[nn.Linear, ...],
        feed_forward: tuple[tuple[nn.Linear, ...], PackedGates],
        kernels: Kernels,
    ) -> None:
        attention = module.self_attn
        gate_layers, self._gates = feed_forward
        self._module = module
        self._kernels = kernels
        self._output = pack_layer(attention.o_proj, kernels)
        self._between = norms[1]
        self._projected = _Projections(norms[0], projections, kernels)
        self.packed_layers = (*projections, attention.o_proj, *gate_layers)
        self._parts: dict[nn.Module, KernelForward | None] = {
            layer: _Projection(self._projected, place) for place, layer in enumerate(projections)
        }
        self._parts |= {attention.o_proj: _Passing(), module.mlp: None}
        self._parts |= dict.fromkeys((module.input_layernorm, module.post_attention_layernorm))

    @property
    def parts(self) -> Mapping[nn.Module, KernelForward | None]:
        """The layers around attention; norms and feed-forward layer are not called any more."""
        return self._parts

    def __call__(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        """Return the block's states [1, tokens, width]."""
        states = hidden_states.contiguous()
        attended, _ = self._module.self_attn(hidden_states=states, **named)
        self._kernels.conclude(states, attended, self._output, self._between, self._gates)
        return states


class _Projections:
    """The layers that make queries, keys and values of a block's states, their norm included: all at the first call."""

    def __init__(self, norm: RmsNorm, layers: tuple[nn.Linear, ...], kernels: Kernels) -> None:
        self._norm = norm
        self._weights = [pack_layer(layer, kernels) for layer in layers]
        self._kernels = kernels
        self._waiting: dict[int, torch.Tensor] = {}

    def take(self, place: int, states: torch.Tensor) -> torch.Tensor:
        if place not in self._waiting:
            self._waiting = dict(enumerate(self._kernels.project(states, self._norm, self._weights)))
        return self._waiting.pop(place)


class _Projection(KernelForward):
    """One of these layers."""

    def __init__(self, projected: _Projections, place: int) -> None:
        self._projected = projected
        self._place = place

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the product of the states' norm [..., outputs]."""
        return self._projected.take(self._place, states)


class _Passing(KernelForward):
    """A layer that the block runs itself, later."""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states."""
        return states


def block_of(module: Any, kernels: Kernels) -> FusedDecoderBlock | None:
    """Return a block on the kernels; None where the module is no such block."""
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "hidden_size")
    if not all(hasattr(module, name) for name in names):
        return None
    projections = _projections_of(module.self_attn)
    norms = [norm_of(norm, kernels) for norm in (module.input_layernorm, module.post_attention_layernorm)]
    gates, activation = gates_of(module.mlp), activation_of(module.mlp)
    if projections is None or norms[0] is None or norms[1] is None or gates is None or activation is None:
        return None
    if not all(can_be_packed(layer, kernels) for layer in (*projections, module.self_attn.o_proj, *gates)):
        return None
    if any(layer.bias is not None for layer in gates):
        return None
    feed_forward = gates, pack_gates(gates, activation, kernels)
    block = FusedDecoderBlock(module, (norms[0].norm, norms[1].norm), projections, feed_forward, kernels)
    return block if _joins_alike(block, module, projections[0]) else None


def _projections_of(attention: Any) -> tuple[nn.Linear, ...] | None:
    for names in PROJECTIONS:
        layers = tuple(getattr(attention, name, None) for name in names)
        if all(isinstance(layer, nn.Linear) for layer in (*layers, getattr(attention, "o_proj", None))):
            return layers  # type: ignore[return-value]  # all are linear
    return None


def _joins_alike(block: FusedDecoderBlock, module: Any, first: nn.Linear) -> bool:
    """Try the block with an attention that looks at nothing: it passes the first projection on."""
    states = trial_states(module.hidden_size)
    output, width = module.self_attn.o_proj, module.self_attn.o_proj.in_features
    with _instead_of(module.self_attn, lambda hidden_states, **_: (output(first(hidden_states)[..., :width]), None)):
        wanted = plain_forward(module)(states)
    projection = block.parts[first]
    with _instead_of(module.self_attn, lambda hidden_states, **_: (projection(hidden_states)[..., :width], None)):  # type: ignore[misc]
        return agree(block(states.clone()), wanted)


@contextmanager
def _instead_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # an attribute is called in the method's place
    try:
        yield
    finally:
        del module.forward
