"""A head on many states at once, with outputs that do not depend on the number of states.

Libraries choose a kernel by the number of rows, and with it the order in which a row's products are added, for matrix
products and for sums alike. Adding halves element by element fixes the order.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad


def batch_invariant_head(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return float32 [rows, outputs]: each state's products with the weights, summed pairwise as a tree, plus the bias.

    It takes a few small kernels for all rows together. Every step is elementwise, so a row's bits do not depend on the
    other rows, on any device that rounds as IEEE 754 requires.

    Args:
        states: [rows, hidden], of any float type.
        weight: float32 [outputs, hidden].
        bias: float32 [outputs], or None.
    """
    states = states.float()
    # One output after the other, so that the products of a head with many outputs need little memory at a time.
    sums = torch.cat([tree_sums(states * row) for row in weight], dim=1)
    return sums if bias is None else sums + bias


def tree_sums(products: torch.Tensor) -> torch.Tensor:
    """Return [..., 1], the sums over the last dimension, as a tree; a row's bits depend on that row alone."""
    products = pad(products, (0, _power_of_two(products.shape[-1]) - products.shape[-1]))
    while products.shape[-1] > 1:
        half = products.shape[-1] // 2
        products = products[..., :half] + products[..., half:]
    return products


def batch_invariant_layers(states: torch.Tensor, layers: nn.Sequential) -> torch.Tensor:
    """Return float32 [rows, outputs] of a head of several layers, the last of which is linear.

    Layers before the last multiply each state alone, so that all products have one shape and therefore one order of
    additions. The number of kernels grows with the number of states; such a head runs once for each sequence.

    Args:
        states: [rows, hidden], of any float type.
        layers: linear layers and activations.
    """
    states, last = states.float(), layers[-1]
    if not isinstance(last, nn.Linear):
        raise TypeError("The last layer of a head is linear")
    for module in list(layers)[:-1]:
        is_linear = isinstance(module, nn.Linear)
        states = torch.cat([module(state[None]) for state in states]) if is_linear else module(states)
    return batch_invariant_head(states, last.weight, last.bias)


def _power_of_two(minimum: int) -> int:
    power = 1
    while power < minimum:
        power *= 2
    return power
