"""Linear layers on a CPU whose result for a token does not depend on the number of tokens in the product.

CPU libraries choose their kernel, and with it the order of additions, by the number of rows. In half precision this
rounding grows through the layers to some hundredths of the rewards' standard deviation, far above the accepted effect
of the batch composition. But most numbers of rows share a kernel: the numbers that give the same bits are determined
once for each shape, and products are computed in blocks of these sizes only.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn.functional import linear

STEP = 128
"""Block sizes are multiples of this many rows, which fill the tiles of a CPU's matrix units."""

MIN_BLOCK_ROWS = 384
"""Rows of the smallest block. Below, oneDNN chooses other kernels for most shapes (observed with AMX)."""

MAX_BLOCK_ROWS = 2048
"""Rows of the largest block; reading the weight less often than that gains nothing."""


class BatchInvariantLinear(nn.Linear):
    """A linear layer that multiplies in blocks of sizes that give the same bits; the last one is padded with zeros."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return what ``nn.Linear`` returns, up to rounding."""
        bias: torch.Tensor | None = self._parameters["bias"]  # torch's stubs deny that `self.bias` may be None
        multiply = linear_operator if torch.compiler.is_compiling() else batch_invariant_linear
        return multiply(states, self.weight, bias)


def batch_invariant_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply states [..., in] by a weight [out, in] in blocks of sizes that give the same bits: [..., out]."""
    out_features, in_features = weight.shape
    num_rows = states.numel() // in_features
    sizes = equivalent_sizes(in_features, out_features, bias is not None, weight.dtype, torch.get_num_threads())
    if num_rows in sizes:
        return linear(states, weight, bias)
    rows = states.reshape(-1, in_features)
    output = rows.new_empty(num_rows, out_features)
    first = 0
    for size in plan_blocks(num_rows, sizes):
        block, block_output = rows[first : first + size], output[first : first + size]
        if len(block) == size:
            _multiply_into(block_output, block, weight, bias)
        else:
            padded = nn.functional.pad(block, (0, 0, 0, size - len(block)))
            block_output.copy_(linear(padded, weight, bias)[: len(block)])
        first += size
    return output.view(*states.shape[:-1], out_features)


@torch.library.custom_op("reward_service::batch_invariant_linear", mutates_args=())
def linear_operator(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``batch_invariant_linear`` as a custom operator, which ``torch.compile`` calls without tracing into it."""
    return batch_invariant_linear(states, weight, bias)


@linear_operator.register_fake
def _output_shape(states: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
    return states.new_empty((*states.shape[:-1], weight.shape[0]))


def _multiply_into(output: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write the result of ``linear`` without a copy, by the operations that ``linear`` itself calls."""
    if bias is None:
        torch.mm(rows, weight.T, out=output)
    else:
        torch.addmm(bias, rows, weight.T, out=output)


def padded_rows(num_rows: int, min_rows: int = MIN_BLOCK_ROWS) -> int:
    """Return the length to which a packed batch is padded, so that most layers need one block only."""
    return max(min_rows, -(-num_rows // STEP) * STEP)


def plan_blocks(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the blocks that cover all rows: with the least padding, then with the fewest blocks.

    Args:
        num_rows: at least one.
        sizes: block sizes that give the same bits; multiples of ``STEP``.
    """
    return _best_blocks(-(-num_rows // STEP) * STEP, sizes)


@cache
def _best_blocks(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    plans = [(size,) if size >= num_rows else (size, *_best_blocks(num_rows - size, sizes)) for size in sizes]
    return min(plans, key=lambda blocks: (sum(blocks), len(blocks)))


@cache
def equivalent_sizes(
    in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype, num_threads: int
) -> tuple[int, ...]:
    """Return the block sizes that give each row the same bits as ``MIN_BLOCK_ROWS`` rows do; ascending.

    They are found by trial on random inputs: the kernel depends on the shape and on the number of threads, not on the
    values, and a different order of additions changes at least some of the results.
    """
    del num_threads  # a part of the cache key: it decides how rows are divided among threads
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(STEP, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None

    def results(size: int) -> torch.Tensor:
        return linear(rows.repeat(size // STEP, 1), weight, bias).view(size // STEP, STEP, out_features)

    expected = results(MIN_BLOCK_ROWS)[0]
    larger = range(MIN_BLOCK_ROWS + STEP, MAX_BLOCK_ROWS + 1, STEP)
    return MIN_BLOCK_ROWS, *(size for size in larger if bool((results(size) == expected).all()))


def set_batch_invariant_linear(body: nn.Module, *, enabled: bool) -> None:
    """Turn all plain linear layers of a model into batch-invariant ones, or back; no weight is copied.

    Layers of other classes (quantized, sharded) are not changed.
    """
    present, target = (nn.Linear, BatchInvariantLinear) if enabled else (BatchInvariantLinear, nn.Linear)
    for module in body.modules():
        if type(module) is present:
            module.__class__ = target  # the same parameters with another forward
