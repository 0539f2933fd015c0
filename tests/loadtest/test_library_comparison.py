"""The products of CPU libraries are compared on the layers of a model, each against the same result."""

from __future__ import annotations

import time

import pytest
import torch

from loadtest.library_comparison import compare_libraries, decoder_shapes, has_same_bits
from loadtest.matmul_products import LIBRARIES, LibraryMissing
from loadtest.random_checkpoint import ModelShape


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_multiplies(name: str) -> None:
    """Each product is the linear layer, so the speeds are those of the same work."""
    states, weight = torch.randn(40, 64), torch.randn(96, 64)
    try:
        product = LIBRARIES[name](weight, 40)
    except LibraryMissing as missing:
        pytest.skip(str(missing))

    torch.testing.assert_close(product(states), states @ weight.T, atol=1e-4, rtol=1e-4)


def test_a_library_whose_bits_depend_on_the_batch_is_found() -> None:
    """A product that adds the number of rows is not batch invariant; one that ignores it is."""
    states, weight = torch.randn(50, 32), torch.randn(32, 32)
    for addend, expected in ((0.0, True), (1e-3, False)):

        def library(weight: torch.Tensor, rows: int, addend: float = addend) -> object:
            return lambda states: (states[:, None] * weight).sum(-1) + addend * rows

        assert has_same_bits(library, weight, states, library(weight, 50)(states)) is expected  # type: ignore[arg-type, operator]


def test_all_layers_of_a_block_are_counted() -> None:
    """Queries and output, keys and values, gate and up, and down; each round has a time of each library."""
    shapes = decoder_shapes(ModelShape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2))

    assert shapes == {(64, 64): 4, (64, 32): 4, (64, 96): 4, (96, 64): 2}
    found = compare_libraries({name: LIBRARIES[name] for name in ("torch, MKL",)}, shapes, 8, 2, time.perf_counter)
    assert [len(one.seconds) for one in found] == [2]
    assert all(second > 0 for second in found[0].seconds)
