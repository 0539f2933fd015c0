"""Linear layers for ``batching.batch_invariant``: they multiply in blocks of sizes that have passed a trial.

A library chooses its kernel, and with it the order in which a row's products are added, by the shape of a product. A
block has one of a few numbers of rows, so few shapes occur, and each of them is tried once: in every size that is used,
a row has the same bits at every position of the block. That also excludes kernels which distribute the additions of
some rows differently (split-K for a part of the tiles, stream-K).

``batch_invariant`` is the cheaper form of the same idea for CPUs in half precision, which is always on there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cache

import torch
from torch import nn
from torch.nn.functional import pad

from service.errors import InvarianceError

STEP = 128
"""Sizes are multiples of this many rows. A block of a contiguous tensor then starts at a multiple of 256 bytes."""

CUDA_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of rows that are tried on CUDA."""

CPU_SIZES = (384, 512, 768, 1024, 1536, 2048)
"""Numbers of rows that are tried on a CPU; see ``batch_invariant.MIN_BLOCK_ROWS`` for the smallest."""

BLOCK_OVERHEAD_ROWS = 256
"""What another block costs, in rows. An estimate that awaits measurement: a short product does not occupy a GPU, and
each one is a launch."""

ALIGNMENT = 256
"""Bytes. A library may choose its kernel by the alignment of the operands too, up to this."""

SHIFTS = (0, 1, 37, 90)
"""Rotations of the rows in a trial, so that each row is at several positions of every tile."""

SHIFT_PER_GROUP = 17
"""Further rotation from one group of ``STEP`` rows to the next."""


class VerifiedLinear(nn.Linear):
    """A linear layer whose products run in blocks of sizes that have passed the trial."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return what ``nn.Linear`` returns, up to rounding.

        Raises:
            InvarianceError: no size passes the trial.
        """
        bias: torch.Tensor | None = self._parameters["bias"]  # torch's stubs deny that `self.bias` may be None
        return multiply_in_blocks(states, self.weight, bias, sizes_of(self))


def multiply_in_blocks(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Multiply states [..., in] by a weight [out, in] in blocks of these numbers of rows: [..., out].

    The last block is padded with zeros. Every product is the same call on operands of the same alignment.
    """
    out_features, in_features = weight.shape
    rows = _aligned(states.reshape(-1, in_features))
    output = rows.new_empty(len(rows), out_features)
    first = 0
    for size in plan_blocks(len(rows), sizes):
        block, block_output = rows[first : first + size], output[first : first + size]
        if len(block) == size:
            multiply_into(block_output, block, weight, bias)
        else:
            padded_output = rows.new_empty(size, out_features)
            multiply_into(padded_output, pad(block, (0, 0, 0, size - len(block))), weight, bias)
            block_output.copy_(padded_output[: len(block)])
        first += size
    return output.view(*states.shape[:-1], out_features)


def multiply_into(output: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write ``rows @ weight.T + bias`` into ``output``."""
    if bias is None:
        torch.mm(rows, weight.T, out=output)
    else:
        torch.addmm(bias, rows, weight.T, out=output)


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows, contiguous and aligned as the allocator aligns; a copy only where they are not."""
    rows = rows.contiguous()
    return rows.clone() if rows.is_cuda and rows.data_ptr() % ALIGNMENT else rows


# --- Which blocks ----------------------------------------------------------------------------------------------------


def plan_blocks(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the blocks that cover all rows at the least cost, which ``BLOCK_OVERHEAD_ROWS`` defines.

    Args:
        num_rows: any number.
        sizes: ascending multiples of ``STEP``.
    """
    num_full, rest = divmod(num_rows, sizes[-1])
    return (sizes[-1],) * num_full + _cheapest_blocks(-(-rest // STEP), sizes)


@cache
def _cheapest_blocks(num_steps: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if num_steps <= 0:
        return ()
    plans = [(size, *_cheapest_blocks(num_steps - size // STEP, sizes)) for size in sizes]
    return min(plans, key=lambda blocks: (sum(blocks) + BLOCK_OVERHEAD_ROWS * len(blocks), len(blocks)))


# --- The trial -------------------------------------------------------------------------------------------------------


def sizes_of(layer: nn.Linear) -> tuple[int, ...]:
    """Return the sizes of the blocks in which a layer multiplies, ascending.

    Raises:
        InvarianceError: no size passes the trial.
    """
    weight = layer.weight
    out_features, in_features = weight.shape
    has_bias = layer._parameters["bias"] is not None  # noqa: SLF001 - as in ``VerifiedLinear.forward``
    return verified_sizes(out_features, in_features, has_bias, weight.dtype, weight.device, torch.get_num_threads())


@cache
def verified_sizes(
    out_features: int, in_features: int, has_bias: bool, dtype: torch.dtype, device: torch.device, num_threads: int
) -> tuple[int, ...]:
    """Return numbers of rows in all of which a row has the same bits at every position; found by trial, ascending.

    Raises:
        InvarianceError: in each of them the bits of a row depend on its position.
    """
    del num_threads  # a part of the cache key: on a CPU it decides how rows are divided among threads
    rows, weight = cancelling_operands(in_features, out_features, dtype, device)
    bias = torch.zeros(out_features, dtype=dtype, device=device) if has_bias else None
    sizes = passing_sizes(CUDA_SIZES if device.type == "cuda" else CPU_SIZES, rows, weight, bias)
    if not sizes:
        raise InvarianceError(
            f"on {device} a product of {in_features} by {out_features} in {str(dtype).removeprefix('torch.')} gives a "
            "row other bits at other positions, in blocks of every size that was tried"
        )
    return sizes


def cancelling_operands(
    in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random rows [STEP, in] and a weight [out, in] whose products are zero but for the rounding of their sums.

    Each product occurs twice with opposite signs, at different positions. What is left consists of rounding errors, so
    another order of additions shows in nearly every element, also where the result is in half precision. With ordinary
    numbers one element of ten thousand would show it.
    """
    generator = torch.Generator().manual_seed(in_features)
    half = in_features // 2
    order = torch.randperm(half, generator=generator)
    rows = torch.zeros(STEP, in_features)
    rows[:, :half] = torch.randn(STEP, half, generator=generator)
    rows[:, half : 2 * half] = -rows[:, order]
    weight = torch.zeros(out_features, in_features)
    # In float16 rounding errors of sums of this magnitude are normal numbers, and no partial sum overflows.
    weight[:, :half] = 16 * torch.randn(out_features, half, generator=generator)
    weight[:, half : 2 * half] = weight[:, order]
    return rows.to(device, dtype), weight.to(device, dtype)


@torch.inference_mode()
def passing_sizes(
    sizes: Sequence[int], rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[int, ...]:
    """Return the largest set of the sizes in which a row has the same bits at every position and in each size.

    Of sets that are equally large, the one with the largest size is returned; an empty one where no size passes.

    Args:
        sizes: ascending multiples of ``STEP``.
        rows: [STEP, in], different from each other.
        weight: [out, in].
        bias: [out], or None.
    """
    sets: list[tuple[torch.Tensor, list[int]]] = []
    for size in sizes:
        found = _result_at_any_position(size, rows, weight, bias)
        if found is None:
            continue
        equal = next((members for expected, members in sets if torch.equal(expected, found)), None)
        if equal is None:
            sets.append((found, [size]))
        else:
            equal.append(size)
    largest: list[int] = max((members for _, members in sets), key=lambda sizes: (len(sizes), sizes[-1]), default=[])
    return tuple(largest)


def _result_at_any_position(
    size: int, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the bits of each row's result in blocks of this size; None where they depend on the position."""
    expected: torch.Tensor | None = None
    positions = torch.arange(size)
    for shift in SHIFTS:
        index = ((positions + shift + positions // STEP * SHIFT_PER_GROUP) % STEP).to(rows.device)
        output = rows.new_empty(size, len(weight))
        multiply_into(output, rows[index], weight, bias)
        bits = output.view(torch.uint8)
        if expected is None:  # the first STEP rows are in their own order
            expected = bits[:STEP].clone()
        if not torch.equal(bits, expected[index]):
            return None
    return expected


# --- Which layers ----------------------------------------------------------------------------------------------------


def set_verified_linear(root: nn.Module, *, enabled: bool) -> None:
    """Turn all plain linear layers into verified ones, or back; no weight is copied. Other classes are not changed."""
    present, target = (nn.Linear, VerifiedLinear) if enabled else (VerifiedLinear, nn.Linear)
    for module in root.modules():
        if type(module) is present:
            module.__class__ = target  # the same parameters with another forward


def check_products(root: nn.Module, other: Collection[nn.Module] = ()) -> None:
    """Check that every layer multiplies in verified blocks, and try all their shapes now.

    Args:
        root: a model, or a part of it.
        other: layers that compute each row independently by other means.

    Raises:
        InvarianceError: a layer multiplies otherwise, or no size passes the trial.
    """
    found = list(_other_products(root, other))
    if found:
        more = f" and {len(found) - 1} others" if len(found) > 1 else ""
        raise InvarianceError(f"it multiplies otherwise than in plain linear layers: {found[0]}{more}")
    for layer in verified_layers(root):
        if layer not in other:
            sizes_of(layer)


def verified_layers(root: nn.Module) -> list[VerifiedLinear]:
    """Return all layers that multiply in verified blocks."""
    return [module for module in root.modules() if isinstance(module, VerifiedLinear)]


def smallest_blocks(root: nn.Module, other: Collection[nn.Module] = ()) -> int:
    """Return the rows to which the shortest product of a model is padded: the largest of the layers' smallest blocks.

    Args:
        root: a model, or a part of it.
        other: layers that multiply otherwise.
    """
    return max((sizes_of(layer)[0] for layer in verified_layers(root) if layer not in other), default=1)


def _other_products(root: nn.Module, other: Collection[nn.Module]) -> Iterator[str]:
    """Yield the modules with a weight matrix that is neither looked up nor multiplied in verified blocks."""
    for name, module in root.named_modules():
        if isinstance(module, nn.Embedding | VerifiedLinear) or module in other:
            continue
        if any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
            yield f"{name} ({type(module).__name__})"
