"""A comparison of the matrix products of CPU libraries: speed in alternating rounds, and bits in any batch."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.table import Table

from loadtest.console import report_console
from loadtest.contenders import CLOCKS
from loadtest.matmul_limit import LayerShape
from loadtest.matmul_products import BASELINE, LIBRARIES, Library, LibraryMissing, Product
from loadtest.random_checkpoint import SHAPES, ModelShape
from service.engines.devices.device import resolve_threads, retain_freed_memory

REPEATS = 3
"""Products of each library in a round; the fastest one counts."""

OTHER_ROWS = (1, 7, 40, 130, 384, 1000)
"""Numbers of rows whose results are compared bit for bit with those of the same rows in a full batch."""


@dataclass(frozen=True, slots=True)
class LibrarySpeed:
    """One library on all layers of a model."""

    library: str

    seconds: tuple[float, ...]
    """Of all products of one batch, in each round."""

    same_bits: bool
    """Whether a row has the same bits in products of any number of rows."""


def run(options: argparse.Namespace) -> int:
    """Compare as the command's options say; return the exit status."""
    console = report_console()
    torch.set_num_threads(resolve_threads(options.threads))
    console.print(f"torch uses {torch.backends.cpu.get_cpu_capability()}; {options.clock} clock", markup=False)
    retain_freed_memory()  # as the service does
    libraries: dict[str, Library] = {}
    for name, library in LIBRARIES.items():
        try:
            library(torch.randn(32, 32), 1)
        except LibraryMissing as missing:
            console.print(f"without {name}: {missing}", markup=False)
        else:
            libraries[name] = library
    for name in options.shapes:
        shapes = decoder_shapes(SHAPES[name])
        found = compare_libraries(libraries, shapes, options.rows, options.rounds, CLOCKS[options.clock])
        flops = sum(2 * count * options.rows * inputs * outputs for (inputs, outputs), count in shapes.items())
        console.print(_table(f"{name}, {options.rows} rows, {torch.get_num_threads()} threads", found, flops))
    return 0


def decoder_shapes(shape: ModelShape) -> Counter[LayerShape]:
    """Count the linear layers of a Qwen2-shaped decoder."""
    key_width = shape.hidden // shape.heads * shape.kv_heads
    block = [
        *[(shape.hidden, shape.hidden)] * 2,
        *[(shape.hidden, key_width)] * 2,
        *[(shape.hidden, shape.intermediate)] * 2,
        (shape.intermediate, shape.hidden),
    ]
    return Counter(block * shape.layers)


@torch.inference_mode()
def compare_libraries(
    libraries: Mapping[str, Library],
    shapes: Mapping[LayerShape, int],
    num_rows: int,
    num_rounds: int,
    now: Callable[[], float],
) -> list[LibrarySpeed]:
    """Multiply one matrix of each shape; the order of the libraries changes with every round."""
    names = list(libraries)
    seconds = {name: [0.0] * num_rounds for name in names}
    same_bits = dict.fromkeys(names, True)
    for (inputs, outputs), count in shapes.items():
        random = torch.Generator().manual_seed(0)
        states, weight = torch.randn(num_rows, inputs, generator=random), torch.randn(outputs, inputs, generator=random)
        weight = weight.bfloat16().float()  # as most published checkpoints are stored
        products = {name: library(weight, num_rows) for name, library in libraries.items()}
        for name, library in libraries.items():
            same_bits[name] &= has_same_bits(library, weight, states, products[name](states))
        for round_ in range(num_rounds):
            first = round_ % len(names)
            for name in (*names[first:], *names[:first]):
                seconds[name][round_] += count * _fastest(products[name], states, now)
    return [LibrarySpeed(name, tuple(seconds[name]), same_bits[name]) for name in names]


def has_same_bits(library: Library, weight: torch.Tensor, states: torch.Tensor, product: torch.Tensor) -> bool:
    """Whether the first rows alone have the bits that they have in the product of all rows."""
    expected = product.clone()
    return all(
        torch.equal(library(weight, rows)(states[:rows].contiguous()), expected[:rows])
        for rows in OTHER_ROWS
        if rows < len(states)
    )


def _fastest(product: Product, states: torch.Tensor, now: Callable[[], float]) -> float:
    product(states)  # brings the weight into the cache, as for every library
    fastest = float("inf")
    for _ in range(REPEATS):
        started = now()
        product(states)
        fastest = min(fastest, now() - started)
    return fastest


def _table(title: str, found: Sequence[LibrarySpeed], flops: int) -> Table:
    table = Table("library", f"speed: ratio to {BASELINE}", "of each round", "GFLOP/s", "same bits in any batch")
    table.title = title
    baseline = next(one for one in found if one.library == BASELINE)
    for one in found:
        ratios = [base / own for base, own in zip(baseline.seconds, one.seconds, strict=True)]
        table.add_row(
            one.library,
            f"{median(ratios):.2f}",
            " ".join(f"{ratio:.2f}" for ratio in ratios),
            f"{flops / median(one.seconds) / 1e9:.0f}",
            "yes" if one.same_bits else "no",
        )
    return table
