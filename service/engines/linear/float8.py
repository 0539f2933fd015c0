"""Linear layers in fp8 (e4m3) on GPUs that multiply it, with one scale for each row of weights and states.

This module decides which layers are quantized and where fp8 is refused, which can be tested on any machine; the
arithmetic is torchao's. Embeddings and the scalar head are not quantized.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from service.errors import SettingsError

MIN_COMPUTE_CAPABILITY = (8, 9)
"""The first CUDA compute capability with fp8 products: Ada; Hopper follows."""

STEP = 16
"""The inputs and outputs of a quantized layer are multiples of this; other layers are not changed."""


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Check that ``model.quantization`` can be fp8.

    Raises:
        SettingsError: the device cannot multiply fp8, the model is not in bfloat16, or torchao is not installed.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    reason = float8_refusal(capability, dtype, has_torchao=find_spec("torchao") is not None)
    if reason:
        raise SettingsError(f"model.quantization is fp8, but {reason}")


def float8_refusal(capability: tuple[int, int] | None, dtype: torch.dtype, *, has_torchao: bool) -> str:
    """Return why fp8 is not possible, as the end of a sentence; empty where it is.

    Args:
        capability: compute capability of the CUDA device; None: the model runs elsewhere.
        dtype: the dtype of the model's body.
        has_torchao: whether the package is installed.
    """
    if capability is None:
        return "the model runs on a CPU: fp8 needs a GPU of compute capability 8.9 or above"
    if capability < MIN_COMPUTE_CAPABILITY:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}: fp8 needs 8.9 or above"
    if dtype != torch.bfloat16:
        return f"the model runs in {str(dtype).removeprefix('torch.')}: fp8 with a scale per row needs bfloat16"
    if not has_torchao:
        return "torchao is not installed: pip install 'reward-service[fp8]'"
    return ""


def layers_for_float8(body: nn.Module) -> list[str]:
    """Return the names of the layers of a model's body that are quantized: plain linear ones of suitable sizes."""
    return [
        name
        for name, module in body.named_modules()
        if type(module) is nn.Linear and not module.in_features % STEP and not module.out_features % STEP
    ]


def quantize_float8(body: nn.Module) -> int:
    """Quantize the weights of a model's body in place, and its states in each pass; return the number of layers.

    Raises:
        SettingsError: no layer can be quantized.
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
