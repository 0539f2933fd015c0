"""Batch-invariant linear layers compute what plain ones do, and a row's result does not depend on other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from service.engines.linear.batch_invariant import (
    MAX_BLOCK_ROWS,
    MIN_BLOCK_ROWS,
    STEP,
    BatchInvariantLinear,
    equivalent_sizes,
    padded_rows,
    plan_blocks,
    set_batch_invariant_linear,
)


def invariant_layer(
    *, bias: bool, dtype: torch.dtype, in_features: int = 576, out_features: int = 320
) -> BatchInvariantLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    set_batch_invariant_linear(model, enabled=True)
    assert isinstance(model[0], BatchInvariantLinear)
    return model[0]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    "num_rows", [1, MIN_BLOCK_ROWS - 1, MIN_BLOCK_ROWS, MIN_BLOCK_ROWS + 1, MAX_BLOCK_ROWS, MAX_BLOCK_ROWS + 5]
)
@torch.inference_mode()
def test_blocks_compute_the_linear_layer(num_rows: int, bias: bool) -> None:
    """Full and padded blocks give the plain layer's result, in the shape of the input."""
    linear = invariant_layer(bias=bias, dtype=torch.float32)
    states = torch.randn(1, num_rows, 576)

    output = linear(states)

    torch.testing.assert_close(output, nn.functional.linear(states, linear.weight, linear.bias))


@pytest.mark.parametrize("shape", [(576, 320), (1536, 576), (576, 1536), (384, 384)], ids=str)
@torch.inference_mode()
def test_a_row_has_the_same_bits_among_any_others(shape: tuple[int, int]) -> None:
    """A row's result has the same bits alone, first, last and among any number of other rows."""
    linear = invariant_layer(bias=True, dtype=torch.bfloat16, in_features=shape[0], out_features=shape[1])
    states = torch.randn(2600, shape[0], dtype=torch.bfloat16)
    together = linear(states)

    for begin, end in [(0, 1), (2599, 2600), (13, 50), (3, 260), (100, 484), (255, 1023), (7, 775), (500, 2548)]:
        assert torch.equal(linear(states[begin:end]), together[begin:end])


def test_block_sizes_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of rows that gives other bits is detected and not used."""

    def linear_with_an_odd_size(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.linear(rows, weight, bias) + (len(rows) == 3 * MIN_BLOCK_ROWS) * 1e-3

    monkeypatch.setattr("service.engines.linear.batch_invariant.linear", linear_with_an_odd_size)

    sizes = equivalent_sizes.__wrapped__(16, 8, True, torch.float32, 1)  # not the cached ones

    assert 3 * MIN_BLOCK_ROWS not in sizes
    assert sizes[0] == MIN_BLOCK_ROWS


@given(
    num_rows=st.integers(1, 20_000),
    larger=st.sets(st.sampled_from(range(MIN_BLOCK_ROWS + STEP, MAX_BLOCK_ROWS + 1, STEP))),
)
def test_plan_covers_all_rows(num_rows: int, larger: set[int]) -> None:
    """Blocks have allowed sizes, cover every row, and none is empty."""
    sizes = (MIN_BLOCK_ROWS, *sorted(larger))

    blocks = plan_blocks(num_rows, sizes)

    assert set(blocks) <= set(sizes)
    assert sum(blocks) >= num_rows > sum(blocks) - max(blocks)


def test_plan_avoids_padding_before_blocks() -> None:
    """Two full blocks are better than one that is half padding."""
    assert sorted(plan_blocks(1024, (384, 512, 640, 2048))) in ([384, 640], [512, 512])
    assert plan_blocks(2000, (384, 512, 640, 2048)) == (2048,)


@given(num_rows=st.integers(1, 20_000))
def test_a_packed_batch_is_padded_to_a_block_size(num_rows: int) -> None:
    """A packed batch is padded by less than a step, but to no fewer rows than the smallest block."""
    padded = padded_rows(num_rows)

    assert padded % STEP == 0
    assert padded == MIN_BLOCK_ROWS or num_rows <= padded < num_rows + STEP


def test_disabling_restores_plain_layers() -> None:
    """Disabling leaves plain layers with the same weights, and layers of other classes are never changed."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), ForeignLinear(8, 8))
    weight = model[0].weight

    set_batch_invariant_linear(model, enabled=True)
    set_batch_invariant_linear(model, enabled=False)

    assert [type(layer) for layer in model] == [nn.Linear, nn.LayerNorm, ForeignLinear]
    assert model[0].weight is weight


class ForeignLinear(nn.Linear):
    """A linear layer of another class, which must not be changed."""
