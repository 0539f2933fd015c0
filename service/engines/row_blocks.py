"""Linear layers that multiply in blocks of a fixed number of rows, so that no token's result depends on the batch.

CPU libraries choose their kernel, and with it the order of additions, by the number of rows. In half precision that one
rounding grows through the layers to some hundredths of a reward's spread, far above what a batch may change.
"""

from __future__ import annotations

import torch
from torch import nn

NUM_ROWS = 256
"""Rows of a block: enough to keep a CPU's matrix units busy, few enough to fill up for a lone short sequence."""


class RowBlockedLinear(nn.Linear):
    """A linear layer whose every multiplication has ``NUM_ROWS`` rows; the last block is filled up with zeros."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return what ``nn.Linear`` returns, up to rounding."""
        rows = states.reshape(-1, self.in_features)
        output = rows.new_empty(len(rows), self.out_features)
        num_whole = len(rows) // NUM_ROWS * NUM_ROWS
        for first in range(0, num_whole, NUM_ROWS):
            block = slice(first, first + NUM_ROWS)
            self._multiply(rows[block], output[block])
        if num_whole < len(rows):
            filled = rows.new_zeros(NUM_ROWS, self.in_features)
            filled[: len(rows) - num_whole] = rows[num_whole:]
            result = rows.new_empty(NUM_ROWS, self.out_features)
            self._multiply(filled, result)
            output[num_whole:] = result[: len(rows) - num_whole]
        return output.view(*states.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor, output: torch.Tensor) -> None:
        bias = self._parameters["bias"]  # torch's stubs deny that `self.bias` may be None
        if bias is None:
            torch.mm(rows, self.weight.t(), out=output)
        else:
            torch.addmm(bias, rows, self.weight.t(), out=output)


def set_row_blocks(body: nn.Module, *, blocked: bool) -> None:
    """Let all plain linear layers of a model multiply in blocks, or in one piece again; no weight is copied.

    Layers of other classes (quantized, sharded) are left alone.
    """
    present, wanted = (nn.Linear, RowBlockedLinear) if blocked else (RowBlockedLinear, nn.Linear)
    for module in body.modules():
        if type(module) is present:
            module.__class__ = wanted  # the same layer with another forward
