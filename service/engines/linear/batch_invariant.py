"""Linear layers whose result for a token does not depend on how many tokens are multiplied at once.

CPU libraries choose their kernel, and with it the order of additions, by the number of rows. In half precision that one
rounding grows through the layers to some hundredths of a reward's spread, far above what a batch may change. Most
numbers of rows share a kernel, though: which do is found out once for each shape, and only those are multiplied.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn.functional import linear

STEP = 128
"""Numbers of rows are multiples of this: the tiles of a CPU's matrix units are then always full."""

SMALLEST = 384
"""Rows of the smallest multiplication. Below, oneDNN takes other kernels for most shapes (seen on AMX)."""

LARGEST = 2048
"""Rows of the largest one; beyond it a weight is read often enough for more to gain nothing."""


class RowBlockedLinear(nn.Linear):
    """A linear layer that multiplies numbers of rows which give the same bits; a last block is filled with zeros."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return what ``nn.Linear`` returns, up to rounding."""
        bias: torch.Tensor | None = self._parameters["bias"]  # torch's stubs deny that `self.bias` may be None
        multiply = opaque_linear if torch.compiler.is_compiling() else blocked_linear
        return multiply(states, self.weight, bias)


def blocked_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply states [..., in] with a weight [out, in] in numbers of rows that give the same bits; [..., out]."""
    out_features, in_features = weight.shape
    num_rows = states.numel() // in_features
    sizes = agreeing_sizes(in_features, out_features, bias is not None, weight.dtype, torch.get_num_threads())
    if num_rows in sizes:
        return linear(states, weight, bias)
    rows = states.reshape(-1, in_features)
    output = rows.new_empty(num_rows, out_features)
    first = 0
    for size in plan_blocks(num_rows, sizes):
        block, place = rows[first : first + size], output[first : first + size]
        if len(block) == size:
            _multiply_into(place, block, weight, bias)
        else:
            filled = nn.functional.pad(block, (0, 0, 0, size - len(block)))
            place.copy_(linear(filled, weight, bias)[: len(block)])
        first += size
    return output.view(*states.shape[:-1], out_features)


@torch.library.custom_op("reward_service::blocked_linear", mutates_args=())
def opaque_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Do what ``blocked_linear`` does, as one operator that a compiler calls and does not look into."""
    return blocked_linear(states, weight, bias)


@opaque_linear.register_fake
def _shape_of_product(states: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
    return states.new_empty((*states.shape[:-1], weight.shape[0]))


def _multiply_into(place: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write what ``linear`` returns, which calls the same two operations, without copying it."""
    if bias is None:
        torch.mm(rows, weight.T, out=place)
    else:
        torch.addmm(bias, rows, weight.T, out=place)


def padded_rows(num_rows: int) -> int:
    """Return the number of rows at which a packed row should end, so that most layers need no blocks at all."""
    return max(SMALLEST, -(-num_rows // STEP) * STEP)


def plan_blocks(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the blocks that cover so many rows: with fewest rows to spare, then fewest blocks.

    Args:
        num_rows: at least one.
        sizes: of blocks that give the same bits; multiples of ``STEP``.
    """
    return _best_blocks(-(-num_rows // STEP) * STEP, sizes)


@cache
def _best_blocks(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    plans = [(size,) if size >= num_rows else (size, *_best_blocks(num_rows - size, sizes)) for size in sizes]
    return min(plans, key=lambda blocks: (sum(blocks), len(blocks)))


@cache
def agreeing_sizes(
    in_features: int, out_features: int, is_biased: bool, dtype: torch.dtype, num_threads: int
) -> tuple[int, ...]:
    """Try which numbers of rows give every row the bits that it has among ``SMALLEST`` rows; ascending.

    The kernel depends on the shape and on the number of threads, not on the numbers, so random ones will do; any other
    order of additions shows somewhere among so many results.
    """
    del num_threads  # part of the key: with other threads, rows are shared out differently
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(STEP, in_features, generator=random).to(dtype)
    weight = torch.randn(out_features, in_features, generator=random).to(dtype)
    bias = torch.randn(out_features, generator=random).to(dtype) if is_biased else None

    def results(size: int) -> torch.Tensor:
        return linear(rows.repeat(size // STEP, 1), weight, bias).view(size // STEP, STEP, out_features)

    wanted = results(SMALLEST)[0]
    larger = range(SMALLEST + STEP, LARGEST + 1, STEP)
    return SMALLEST, *(size for size in larger if bool((results(size) == wanted).all()))


def set_batch_invariant_linear(body: nn.Module, *, blocked: bool) -> None:
    """Let all plain linear layers of a model multiply in blocks, or in one piece again; no weight is copied.

    Layers of other classes (quantized, sharded) are left alone.
    """
    present, wanted = (nn.Linear, RowBlockedLinear) if blocked else (RowBlockedLinear, nn.Linear)
    for module in body.modules():
        if type(module) is present:
            module.__class__ = wanted  # the same layer with another forward
