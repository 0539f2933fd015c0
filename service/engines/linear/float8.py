"""Linear layers in fp8 (e4m3), for GPUs that multiply it: weights and states are scaled row by row.

What is quantized, and where that is refused, is decided here and can be tested anywhere; the arithmetic is torchao's.
Embeddings stay as they are, and the head is not part of the body.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from service.errors import SettingsError

LEAST_CAPABILITY = (8, 9)
"""Compute capability from which on GPUs multiply fp8: Ada and Hopper."""

STEP = 16
"""Features on both sides of a layer are a multiple of this, or the layer stays as it is."""


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Say nothing where ``model.quantization`` can be fp8.

    Raises:
        SettingsError: the device cannot multiply fp8, the model is not in bfloat16, or torchao is not installed.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    refusal = refusal_of(capability, dtype, has_torchao=find_spec("torchao") is not None)
    if refusal:
        raise SettingsError(f"model.quantization is fp8, but {refusal}")


def refusal_of(capability: tuple[int, int] | None, dtype: torch.dtype, *, has_torchao: bool) -> str:
    """Return why fp8 cannot be, as the end of a sentence; empty where it can.

    Args:
        capability: of the CUDA device; None: the model runs elsewhere.
        dtype: of the model's body.
        has_torchao: whether the package is there.
    """
    if capability is None:
        return "the model runs on a CPU: fp8 takes a GPU of compute capability 8.9 or above"
    if capability < LEAST_CAPABILITY:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}: fp8 takes 8.9 or above"
    if dtype != torch.bfloat16:
        return f"the model runs in {str(dtype).removeprefix('torch.')}: scaled row by row it must be in bfloat16"
    if not has_torchao:
        return "torchao is not installed: pip install 'reward-service[fp8]'"
    return ""


def layers_for_float8(body: nn.Module) -> list[str]:
    """Return the names of the layers of a model's body that are quantized: plain linear ones whose sizes suit."""
    return [
        name
        for name, module in body.named_modules()
        if type(module) is nn.Linear and not module.in_features % STEP and not module.out_features % STEP
    ]


def quantize_float8(body: nn.Module) -> int:
    """Quantize the weights of a body in place, states whenever they come by; return the number of layers.

    Raises:
        SettingsError: it has no layer that suits.
    """
    import torchao.quantization as ao

    names = set(layers_for_float8(body))
    if not names:
        raise SettingsError("model.quantization is fp8, but no layer has sizes that are multiples of 16")
    config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)

    def is_chosen(_module: Any, name: str) -> bool:
        return name in names

    ao.quantize_(body, config, filter_fn=is_chosen)
    return len(names)
