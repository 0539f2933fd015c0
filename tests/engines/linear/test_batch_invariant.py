"""Row-blocked linear layers compute what plain ones do, and a row's result does not depend on the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from service.engines.linear.batch_invariant import (
    LARGEST,
    SMALLEST,
    STEP,
    RowBlockedLinear,
    agreeing_sizes,
    padded_rows,
    plan_blocks,
    set_batch_invariant_linear,
)


def blocked_linear(*, bias: bool, dtype: torch.dtype, in_features: int = 576, out_features: int = 320) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    set_batch_invariant_linear(model, blocked=True)
    assert isinstance(model[0], RowBlockedLinear)
    return model[0]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("num_rows", [1, SMALLEST - 1, SMALLEST, SMALLEST + 1, LARGEST, LARGEST + 5])
@torch.inference_mode()
def test_blocks_compute_the_linear_layer(num_rows: int, bias: bool) -> None:
    """Whole and filled-up blocks give what the plain layer gives, in the shape of the input."""
    linear = blocked_linear(bias=bias, dtype=torch.float32)
    states = torch.randn(1, num_rows, 576)

    output = linear(states)

    torch.testing.assert_close(output, nn.functional.linear(states, linear.weight, linear.bias))


@pytest.mark.parametrize("shape", [(576, 320), (1536, 576), (576, 1536), (384, 384)], ids=str)
@torch.inference_mode()
def test_a_row_is_the_same_bits_in_any_company(shape: tuple[int, int]) -> None:
    """The same row gives the same bits alone, first, last and among any number of others."""
    linear = blocked_linear(bias=True, dtype=torch.bfloat16, in_features=shape[0], out_features=shape[1])
    states = torch.randn(2600, shape[0], dtype=torch.bfloat16)
    together = linear(states)

    for begin, end in [(0, 1), (2599, 2600), (13, 50), (3, 260), (100, 484), (255, 1023), (7, 775), (500, 2548)]:
        assert torch.equal(linear(states[begin:end]), together[begin:end])


def test_sizes_are_tried_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of rows that gives other bits is found out and left out."""

    def moody(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.linear(rows, weight, bias) + (len(rows) == 3 * SMALLEST) * 1e-3

    monkeypatch.setattr("service.engines.linear.batch_invariant.linear", moody)

    sizes = agreeing_sizes.__wrapped__(16, 8, True, torch.float32, 1)  # not the cached ones

    assert 3 * SMALLEST not in sizes
    assert sizes[0] == SMALLEST


@given(num_rows=st.integers(1, 20_000), larger=st.sets(st.sampled_from(range(SMALLEST + STEP, LARGEST + 1, STEP))))
def test_plan_covers_all_rows(num_rows: int, larger: set[int]) -> None:
    """Blocks have allowed sizes, cover every row, and none of them is empty."""
    sizes = (SMALLEST, *sorted(larger))

    blocks = plan_blocks(num_rows, sizes)

    assert set(blocks) <= set(sizes)
    assert sum(blocks) >= num_rows > sum(blocks) - max(blocks)


def test_plan_spares_rows_before_blocks() -> None:
    """Two blocks that fit are better than one that is half empty."""
    assert sorted(plan_blocks(1024, (384, 512, 640, 2048))) in ([384, 640], [512, 512])
    assert plan_blocks(2000, (384, 512, 640, 2048)) == (2048,)


@given(num_rows=st.integers(1, 20_000))
def test_a_row_ends_where_blocks_end(num_rows: int) -> None:
    """A packed row is filled up by less than a step, but never to fewer rows than the smallest block has."""
    padded = padded_rows(num_rows)

    assert padded % STEP == 0
    assert padded == SMALLEST or num_rows <= padded < num_rows + STEP


def test_blocks_are_taken_off_again() -> None:
    """Switching back leaves plain layers with the very same weights, and other layer classes are never touched."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), RowlessLinear(8, 8))
    weight = model[0].weight

    set_batch_invariant_linear(model, blocked=True)
    set_batch_invariant_linear(model, blocked=False)

    assert [type(layer) for layer in model] == [nn.Linear, nn.LayerNorm, RowlessLinear]
    assert model[0].weight is weight


class RowlessLinear(nn.Linear):
    """A linear layer of a class that is not ours to change."""
