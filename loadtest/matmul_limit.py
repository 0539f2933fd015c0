"""Measures an upper bound of the speed of a model's forward pass on this machine: its matrix products alone.

Random matrices of the layers' shapes are multiplied; no model is run. Attention, norms and all other operations of a
pass are left out, so no real pass reaches the limit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

WARM_UPS = 2
REPEATS = 15
"""Multiplications of each shape; the fastest one counts, since other processes can only slow them down."""

KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", ".key", ".value")
"""Endings of the names of the layers that compute keys or values, in transformers' model families."""

LayerShape: TypeAlias = tuple[int, int]
"""Input and output features of a linear layer."""


@dataclass(frozen=True, slots=True)
class MatmulLimit:
    """The measured limit."""

    tokens_per_s: float

    flops_per_token: int
    """Operations of the linear layers, two a weight."""

    num_rows: int
    """Tokens of the multiplied matrices."""

    @property
    def flops_per_s(self) -> float:
        """Operations per second over all shapes together."""
        return self.tokens_per_s * self.flops_per_token


def layer_shapes(folder: Path) -> Counter[LayerShape]:
    """Count the shapes of the linear layers that a reward needs for every token of a text, without the head.

    A head on the state of one token reads one state after the last block, so of that block only keys and values are
    needed of all tokens. No weights are loaded.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from service.engines.model.taps import blocks_of

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    last_block = blocks_of(model.base_model, model.config.get_text_config().num_hidden_layers)[-1]
    not_needed = {module for name, module in last_block.named_modules() if not name.endswith(KEYS_AND_VALUES)}
    return Counter(
        (module.in_features, module.out_features)
        for module in model.base_model.modules()
        if isinstance(module, torch.nn.Linear) and module not in not_needed
    )


def measure_limit(
    shapes: Mapping[LayerShape, int],
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
) -> MatmulLimit:
    """Multiply ``num_rows`` rows by one matrix of each shape and add up the seconds over all layers.

    On a CPU both fp32 and ``dtype`` are measured, and the faster one counts for each shape: some CPUs multiply fp32 at
    twice the rate of bfloat16, and a pass in bfloat16 may compute its products in fp32.
    """
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    seconds = sum(
        count * min(_multiply(num_rows, shape, arithmetic, device, now) for arithmetic in dtypes)
        for shape, count in shapes.items()
    )
    flops = sum(2 * count * inputs * outputs for (inputs, outputs), count in shapes.items())
    return MatmulLimit(num_rows / seconds, flops, num_rows)


@torch.inference_mode()
def _multiply(
    num_rows: int, shape: LayerShape, dtype: torch.dtype, device: torch.device, now: Callable[[], float]
) -> float:
    """Return the seconds of the fastest of several multiplications."""
    inputs, outputs = shape
    random = torch.Generator(device).manual_seed(0)
    rows = torch.randn(num_rows, inputs, generator=random, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, generator=random, device=device, dtype=dtype)
    product = torch.empty(num_rows, outputs, device=device, dtype=dtype)
    fastest = float("inf")
    for number in range(WARM_UPS + REPEATS):
        _synchronize(device)
        started = now()
        torch.mm(rows, weight.T, out=product)
        _synchronize(device)
        if number >= WARM_UPS:
            fastest = min(fastest, now() - started)
    return fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
