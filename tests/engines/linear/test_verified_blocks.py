"""Products in verified blocks are those of plain layers, and a row has the same bits anywhere among any others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from service.engines.linear import verified_blocks
from service.engines.linear.verified_blocks import (
    CPU_SIZES,
    CUDA_SIZES,
    STEP,
    VerifiedLinear,
    cancelling_operands,
    check_products,
    multiply_into,
    passing_sizes,
    plan_blocks,
    set_verified_linear,
    sizes_of,
    smallest_blocks,
    verified_sizes,
)
from service.errors import InvarianceError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untried():
    """Sizes that a test found with other products are not those of the next test."""
    verified_sizes.cache_clear()
    yield
    verified_sizes.cache_clear()


def verified_layer(
    *, bias: bool, dtype: torch.dtype, in_features: int = 192, out_features: int = 96, device: str = "cpu"
) -> VerifiedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device))
    set_verified_linear(model, enabled=True)
    assert isinstance(model[0], VerifiedLinear)
    return model[0]


def reversed_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same product, added in another order: from the last element of each row to the first."""
    return nn.functional.linear(rows.flip(1), weight.flip(1), bias)


def multiply_with(monkeypatch: pytest.MonkeyPatch, is_reversed) -> None:
    """Let the rows of a product that ``is_reversed`` chooses, by size and position, be added in another order."""

    def multiply(output, rows, weight, bias):
        multiply_into(output, rows, weight, bias)
        chosen = is_reversed(len(rows), torch.arange(len(rows)))
        output[chosen] = reversed_product(rows, weight, bias)[chosen]

    monkeypatch.setattr(verified_blocks, "multiply_into", multiply)


# --- Products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("num_rows", [1, 127, 384, 385, 2048, 2500])
@torch.inference_mode()
def test_blocks_compute_the_linear_layer(num_rows: int, bias: bool) -> None:
    """Full and padded blocks give the plain layer's result, in the shape of the input."""
    layer = verified_layer(bias=bias, dtype=torch.float32)
    states = torch.randn(1, num_rows, 192)

    output = layer(states)

    torch.testing.assert_close(output, nn.functional.linear(states, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_a_row_has_the_same_bits_among_any_others(dtype: torch.dtype) -> None:
    """A row's result has the same bits alone, first, last, and among any number of rows, also as a part of a tensor."""
    layer = verified_layer(bias=True, dtype=dtype)
    states = torch.randn(2600, 192).to(dtype)
    together = layer(states)

    for begin, end in [(0, 1), (2599, 2600), (13, 50), (3, 260), (100, 484), (255, 1023), (500, 2548)]:
        assert torch.equal(layer(states[begin:end]), together[begin:end])
    assert torch.equal(layer(states.T.contiguous().T), together)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(896, 896), (896, 128), (896, 4864), (4864, 896), (4096, 1024)]
)
@torch.inference_mode()
def test_a_row_has_the_same_bits_among_any_others_on_cuda(
    in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    """On CUDA too, in layers of the shapes of 0.5B and 8B models."""
    layer = verified_layer(
        bias=in_features == out_features,
        dtype=dtype,
        in_features=in_features,
        out_features=out_features,
        device="cuda",
    )
    states = torch.randn(20_000, in_features, device="cuda").to(dtype)
    together = layer(states)

    for begin, end in [(0, 1), (19_999, 20_000), (13, 50), (3, 260), (255, 1023), (7, 5000), (500, 19_000)]:
        assert torch.equal(layer(states[begin:end]), together[begin:end])


# --- The trial -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_operands_of_a_trial_show_another_order_of_additions() -> None:
    """Their exact products are zero; in bfloat16 another order shows in most elements, with ordinary ones in few."""
    rows, weight = cancelling_operands(513, 64, torch.bfloat16, CPU)
    ordinary = torch.randn(STEP, 513).bfloat16(), torch.randn(64, 513).bfloat16()

    def changed(rows: torch.Tensor, weight: torch.Tensor) -> float:
        first, second = (product.bfloat16() for product in (rows.float() @ weight.float().T, _in_order(rows, weight)))
        return (first != second).float().mean().item()

    assert torch.equal(rows.double() @ weight.double().T, torch.zeros(STEP, 64, dtype=torch.float64))
    assert changed(rows, weight) > 0.5
    assert changed(*ordinary) < 0.05


def _in_order(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The products in float32, added one after the other from the last."""
    total = torch.zeros(len(rows), len(weight))
    for index in reversed(range(rows.shape[1])):
        total += rows[:, index, None].float() * weight[:, index].float()
    return total


def test_a_size_with_another_order_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of rows for which the library adds in another order is left out; the others remain."""
    usual = sizes_of(verified_layer(bias=False, dtype=torch.bfloat16))
    verified_sizes.cache_clear()
    multiply_with(monkeypatch, lambda size, positions: (positions >= 0) & (size == 768))

    sizes = sizes_of(verified_layer(bias=False, dtype=torch.bfloat16))

    assert 768 in usual
    assert sizes == tuple(size for size in usual if size != 768)


def test_a_size_in_which_the_position_matters_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library adds the rows of the last tile in another order, the size is left out."""
    multiply_with(monkeypatch, lambda size, positions: (positions >= size - 64) & (size > 512))

    assert max(sizes_of(verified_layer(bias=False, dtype=torch.bfloat16))) <= 512


def test_without_a_passing_size_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row's bits depend on its position in blocks of every size, the layer is refused with its shape."""
    multiply_with(monkeypatch, lambda _size, positions: positions % 2 == 1)
    layer = verified_layer(bias=True, dtype=torch.float32)

    with pytest.raises(InvarianceError, match="product of 192 by 96 in float32 gives a row other bits"):
        layer(torch.randn(3, 192))


def test_the_largest_set_of_equal_sizes_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sets of sizes, each with an order of its own, the larger one is used."""
    multiply_with(monkeypatch, lambda size, positions: (positions >= 0) & (size <= 512))
    rows, weight = cancelling_operands(64, 32, torch.float32, CPU)

    assert passing_sizes((128, 256, 512, 1024, 2048, 4096, 8192), rows, weight, None) == (1024, 2048, 4096, 8192)


# --- Which blocks ----------------------------------------------------------------------------------------------------


@given(num_rows=st.integers(1, 70_000), left_out=st.sets(st.sampled_from(CUDA_SIZES[:-1])))
def test_blocks_cover_all_rows(num_rows: int, left_out: set[int]) -> None:
    """Blocks have allowed sizes, cover every row, and none is empty."""
    sizes = tuple(size for size in CUDA_SIZES if size not in left_out)

    blocks = plan_blocks(num_rows, sizes)

    assert set(blocks) <= set(sizes)
    assert sum(blocks) >= num_rows > sum(blocks) - min(blocks)


def test_one_block_is_better_than_many_short_ones() -> None:
    """A block more costs as much as some rows of padding; large batches have the largest blocks."""
    assert plan_blocks(1920, CUDA_SIZES) == (2048,)
    assert sorted(plan_blocks(1100, CUDA_SIZES)) == [128, 1024]
    assert plan_blocks(65_536, CUDA_SIZES) == (8192,) * 8
    assert plan_blocks(1, (2048,)) == (2048,)


# --- Which layers ----------------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """A layer that is no ``nn.Linear``, as GPT-2's ``Conv1D``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


class ForeignLinear(nn.Linear):
    """A linear layer of another class."""


@pytest.mark.parametrize("foreign", [Projection(), ForeignLinear(8, 8)], ids=["projection", "linear"])
def test_a_layer_that_multiplies_otherwise_is_refused_by_name(foreign: nn.Module) -> None:
    """Embeddings and norms multiply no matrices; anything else with a weight matrix is refused, unless it is known."""
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 8), "norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)})
    set_verified_linear(model, enabled=True)
    check_products(model)
    model["mixer"] = foreign

    with pytest.raises(InvarianceError, match=rf"mixer \({type(foreign).__name__}\)"):
        check_products(model)
    check_products(model, {foreign})


def test_disabling_restores_plain_layers() -> None:
    """Disabling leaves plain layers with the same weights, and layers of other classes are never changed."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), ForeignLinear(8, 8))
    weight = model[0].weight

    set_verified_linear(model, enabled=True)
    assert smallest_blocks(model) in CPU_SIZES
    set_verified_linear(model, enabled=False)

    assert [type(layer) for layer in model] == [nn.Linear, nn.LayerNorm, ForeignLinear]
    assert model[0].weight is weight
    assert smallest_blocks(model) == 1
