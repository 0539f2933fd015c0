"""Row-blocked linear layers compute what plain ones do, and a row's result does not depend on the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from service.engines.row_blocks import NUM_ROWS, RowBlockedLinear, set_row_blocks


def blocked_linear(*, bias: bool, dtype: torch.dtype) -> RowBlockedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(576, 320, bias=bias, dtype=dtype))
    set_row_blocks(model, blocked=True)
    linear = model[0]
    assert isinstance(linear, RowBlockedLinear)
    return linear


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("num_rows", [1, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1, 2 * NUM_ROWS])
@torch.inference_mode()
def test_blocks_compute_the_linear_layer(num_rows: int, bias: bool) -> None:
    """Whole and filled-up blocks give what the plain layer gives, in the shape of the input."""
    linear = blocked_linear(bias=bias, dtype=torch.float32)
    states = torch.randn(1, num_rows, 576)

    output = linear(states)

    torch.testing.assert_close(output, nn.functional.linear(states, linear.weight, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_row_is_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """The same row gives the same bits alone, first, last and in a block of another size."""
    linear = blocked_linear(bias=True, dtype=dtype)
    states = torch.randn(700, 576, dtype=dtype)
    together = linear(states)

    for begin, end in [(0, 1), (699, 700), (13, 50), (3, 260), (100, 700), (255, 513)]:
        assert torch.equal(linear(states[begin:end]), together[begin:end])


def test_blocks_are_taken_off_again() -> None:
    """Switching back leaves plain layers with the very same weights, and other layer classes are never touched."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), RowlessLinear(8, 8))
    weight = model[0].weight

    set_row_blocks(model, blocked=True)
    set_row_blocks(model, blocked=False)

    assert [type(layer) for layer in model] == [nn.Linear, nn.LayerNorm, RowlessLinear]
    assert model[0].weight is weight


class RowlessLinear(nn.Linear):
    """A linear layer of a class that is not ours to change."""
