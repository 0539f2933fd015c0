"""Lets a model's own modules compute with the kernels, wherever they do what the kernels do.

No family is named here. What a module computes is found out by trying it: a norm, a gate or a rotation whose numbers
differ from the kernel's stays as transformers wrote it. The parity probe judges the whole afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from service.engines.kernels.bindings import Kernels
from service.engines.kernels.blocks import block_of
from service.engines.kernels.fused_modules import KernelForward, forward_of
from service.engines.linear.int8 import Int8Linear


def attach_kernels(body: nn.Module, kernels: Kernels) -> None:
    """Let the norms, rotations, gated layers and linear layers of a bfloat16 decoder run on the kernels.

    With kernels for int8 only layers that ``quantize_int8`` changed are taken. Weights are packed,
    so they take twice the memory until ``drop_plain_weights``.
    """
    _attach(body, kernels, {})


def _attach(module: nn.Module, kernels: Kernels, parts: Mapping[nn.Module, KernelForward | None]) -> None:
    """Attach to a module and to what is in it; ``parts``: what those around it have settled already."""
    forward = parts[module] if module in parts else block_of(module, kernels) or forward_of(module, kernels)
    if forward is not None:
        module.forward = forward  # an attribute is called in the method's place
        parts = {**parts, **forward.parts}
    elif module in parts:
        return
    for child in module.children():
        _attach(child, kernels, parts)


def detach_kernels(body: nn.Module) -> None:
    """Let every module run as transformers wrote it again.

    Raises:
        RuntimeError: its plain weights were dropped.
    """
    for module, forward in list(_attached(body)):
        if any(layer.weight.numel() == 0 for layer in forward.packed_layers):
            raise RuntimeError("The plain weights were dropped: this model runs on the kernels alone")
        del module.forward


def drop_plain_weights(body: nn.Module) -> None:
    """Free the weights that were packed; from here on the model runs on the kernels or not at all."""
    for _, forward in _attached(body):
        for layer in forward.packed_layers:
            layer.weight.data = layer.weight.new_empty(0)
            if isinstance(layer, Int8Linear):
                layer.left_of_weight = layer.weight


def multiplies_on_kernels(body: nn.Module) -> bool:
    """Whether no linear layer is left whose result may depend on the number of rows."""
    packed = {layer for _, forward in _attached(body) for layer in forward.packed_layers}
    return all(module in packed for module in body.modules() if isinstance(module, nn.Linear))


def _attached(body: nn.Module) -> Iterator[tuple[nn.Module, KernelForward]]:
    for module in body.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, KernelForward):
            yield module, forward
