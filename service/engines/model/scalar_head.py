"""The linear head on many states at once, with a reward that does not depend on how many there are.

Libraries choose a kernel by the number of rows, and with it the order in which a row's products are added: that holds
for matrix products and for sums alike. Halves that are added element by element have one order only.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def batch_invariant_head(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return float32 [rows]: each state's products with the weight, added as a tree, and the bias.

    A few small kernels for all rows together. Every step is element by element, so a row's bits are the same among any
    others, on any device that rounds as IEEE 754 says.

    Args:
        states: [rows, hidden], of any float type.
        weight: float32 [hidden].
        bias: float32 [1], or None.
    """
    products = states.float() * weight
    products = pad(products, (0, _power_of_two(products.shape[1]) - products.shape[1]))
    while products.shape[1] > 1:
        half = products.shape[1] // 2
        products = products[:, :half] + products[:, half:]
    sums = products[:, 0]
    return sums if bias is None else sums + bias


def _power_of_two(least: int) -> int:
    power = 1
    while power < least:
        power *= 2
    return power
