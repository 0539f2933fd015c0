"""The speed that no forward pass of a model can exceed on this machine: its matrix products alone, measured.

It multiplies random matrices of the layers' shapes and runs no model. Attention, norms and everything else that a real
pass has to do besides is left out, so the limit is out of reach by construction; what counts is how near one comes.
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
"""Multiplications of each shape; the fastest counts, since a limit is not what a neighbour's noise leaves of it."""

LayerShape: TypeAlias = tuple[int, int]
"""Input and output features of a linear layer."""


@dataclass(frozen=True, slots=True)
class MatmulLimit:
    """What was measured. ``flops_per_token``: operations of the linear layers (two a weight); rates are per second."""

    tokens_per_s: float
    flops_per_token: int
    num_rows: int

    @property
    def flops_per_s(self) -> float:
        """The machine's rate of operations over all shapes together."""
        return self.tokens_per_s * self.flops_per_token


def layer_shapes(folder: Path) -> Counter[LayerShape]:
    """Count the shapes of the linear layers that each token of a checkpoint's model passes; the head is not among them.

    No weight is loaded.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    return Counter(
        (module.in_features, module.out_features)
        for module in model.base_model.modules()
        if isinstance(module, torch.nn.Linear)
    )


def measure_limit(
    shapes: Mapping[LayerShape, int],
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
) -> MatmulLimit:
    """Multiply ``num_rows`` rows by one matrix of each shape and add up what all layers of a model would take.

    On a CPU fp32 is tried beside the model's own arithmetic, and of each shape the faster one counts: some multiply
    fp32 at twice the rate of bfloat16, and a pass in bfloat16 is free to do its products in fp32.
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
    """Return the seconds of the fastest of a few multiplications."""
    inputs, outputs = shape
    random = torch.Generator(device).manual_seed(0)
    rows = torch.randn(num_rows, inputs, generator=random, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, generator=random, device=device, dtype=dtype)
    product = torch.empty(num_rows, outputs, device=device, dtype=dtype)
    fastest = float("inf")
    for turn in range(WARM_UPS + REPEATS):
        _wait_for(device)
        started = now()
        torch.mm(rows, weight.T, out=product)
        _wait_for(device)
        if turn >= WARM_UPS:
            fastest = min(fastest, now() - started)
    return fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
