"""Replaces the forwards of a model's modules by kernel forwards, wherever these compute the same.

No model family is named here. Whether a kernel computes the same as a module is determined by a trial: a norm, a gate
or a rotary embedding whose results differ keeps transformers' own forward. The parity probe then checks the whole
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from service.engines.kernels.bindings import Kernels
from service.engines.kernels.blocks import match_block
from service.engines.kernels.fused_modules import KernelForward, match_module
from service.engines.linear.int8 import Int8Linear


def attach_kernels(body: nn.Module, kernels: Kernels) -> None:
    """Replace forwards of a decoder in the kernels' dtype: of blocks, norms, rotary attention, gated and linear layers.

    With int8 kernels only the linear layers that ``quantize_int8`` changed are replaced. Packed weights are copies, so
    the weights take twice the memory until ``drop_plain_weights``.
    """
    _attach(body, kernels, {})


def _attach(module: nn.Module, kernels: Kernels, decided: Mapping[nn.Module, KernelForward | None]) -> None:
    """Replace the forwards of a module and its submodules; ``decided``: by the forwards of enclosing modules."""
    forward = decided[module] if module in decided else match_block(module, kernels) or match_module(module, kernels)
    if forward is not None:
        module.forward = forward  # an instance attribute hides the method of the class
        decided = {**decided, **forward.replacements}
    elif module in decided:
        return
    for child in module.children():
        _attach(child, kernels, decided)


def detach_kernels(body: nn.Module) -> None:
    """Restore the original forward of every module.

    Raises:
        RuntimeError: its unpacked weights were dropped.
    """
    for module, forward in list(_attached(body)):
        if any(layer.weight.numel() == 0 for layer in forward.packed_layers):
            raise RuntimeError("The unpacked weights were dropped: this model runs on the CPU kernels only")
        del module.forward


def drop_plain_weights(body: nn.Module) -> None:
    """Free the weights that exist in packed form too; the model then runs on the kernels only."""
    for _, forward in _attached(body):
        for layer in forward.packed_layers:
            layer.weight.data = layer.weight.new_empty(0)
            if isinstance(layer, Int8Linear):
                layer.dequantized_weight = layer.weight


def packs_all_linear_layers(body: nn.Module) -> bool:
    """Whether all linear layers run on the kernels, where a row's result does not depend on the number of rows."""
    packed = packed_layers(body)
    return all(module in packed for module in body.modules() if isinstance(module, nn.Linear))


def packed_layers(body: nn.Module) -> frozenset[nn.Module]:
    """Return the linear layers that run on the kernels, where a row's result does not depend on the number of rows."""
    return frozenset(layer for _, forward in _attached(body) for layer in forward.packed_layers)


def _attached(body: nn.Module) -> Iterator[tuple[nn.Module, KernelForward]]:
    for module in body.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, KernelForward):
            yield module, forward
