"""Writes a tiny checkpoint quantized as published ones are, and returns what its weights are, computed with NumPy.

Values, scales and zero points are drawn at random; the widened matrix follows from them by the formula of the format.
fp8 is decoded bit by bit here, so that nothing is shared with the service.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedFormat:
    """A published way of storing a matrix."""

    config: Mapping[str, Any]
    """``quantization_config`` of the checkpoint."""

    quantize: Callable[[Matrix, np.random.Generator], tuple[Parts, Matrix]]
    """Takes a matrix that gives the magnitude of the weights; returns the stored tensors by suffix, and the weights."""

    words: str
    """What the service says of the format."""

    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors of each module, by suffix."""


def quantize_checkpoint(folder: Path, stored: QuantizedFormat, plain: Path) -> None:
    """Quantize the linear layers of the blocks of a checkpoint in place, and write its widened weights to ``plain``."""
    dice = np.random.default_rng(3)
    weights = load_file(folder / "model.safetensors")
    widened = dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        module, matrix = name.removesuffix(".weight"), weights.pop(name).float().numpy()
        parts, true = stored.quantize(matrix, dice)
        weights |= {f"{module}.{suffix}": part for suffix, part in (parts | dict(stored.extra)).items()}
        widened[name] = torch.from_numpy(true.copy())
    save_file(
        {name: part.clone().contiguous() for name, part in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    save_file(widened, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes()) | {"quantization_config": dict(stored.config)}
    (folder / "config.json").write_text(json.dumps(config))


def decoded_fp8(stored: torch.Tensor) -> Matrix:
    """The numbers of E4M3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; exponent 0 is subnormal."""
    codes = stored.view(torch.uint8).numpy().astype(np.int32)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    magnitudes = np.where(exponents == 0, mantissas / 512.0, (1 + mantissas / 8.0) * 2.0 ** (exponents - 7.0))
    return np.asarray(np.where(codes >> 7, -magnitudes, magnitudes), np.float32)


def spread(grid: Matrix, rows: int, columns: int, block: tuple[int, int]) -> Matrix:
    """The grid's number of each weight, for blocks of this many rows and columns."""
    return np.array([[grid[row // block[0], column // block[1]] for column in range(columns)] for row in range(rows)])


def fp8(grid_of: Callable[[int, int], tuple[tuple[int, ...], tuple[int, int]]], suffix: str, dtype: torch.dtype) -> Any:
    """Random fp8 numbers with scales of this dtype; ``grid_of`` gives shape and block of the scales of a matrix."""

    def quantize(matrix: Matrix, dice: np.random.Generator) -> tuple[Parts, Matrix]:
        rows, columns = matrix.shape
        values = torch.from_numpy(matrix * 200).to(torch.float8_e4m3fn)
        shape, block = grid_of(rows, columns)
        scale = torch.tensor(np.exp2(dice.integers(-9, -6, shape)), dtype=torch.float32).to(dtype)
        if dtype == torch.float32:
            scale *= torch.tensor(dice.uniform(1, 1.3, shape), dtype=torch.float32)
        grid = scale.float().numpy().reshape(shape if len(shape) == 2 else (1, 1))
        return {"weight": values, suffix: scale}, decoded_fp8(values) * spread(grid, rows, columns, block)

    return quantize


def blocks(rows_of_block: int, columns_of_block: int) -> Any:
    return lambda rows, columns: (
        (math.ceil(rows / rows_of_block), math.ceil(columns / columns_of_block)),
        (rows_of_block, columns_of_block),
    )


def whole(rows: int, columns: int) -> Any:
    return (), (rows, columns)


def per_row(_rows: int, columns: int) -> Any:
    return (_rows, 1), (1, columns)


def integers(bits: int, group: int | None, *, packed: bool, symmetric: bool = True, reordered: bool = False) -> Any:
    """Random signed integers with scales in bfloat16, and zero points unless they are symmetric."""

    def quantize(matrix: Matrix, dice: np.random.Generator) -> tuple[Parts, Matrix]:
        rows, columns = matrix.shape
        low, high, width = -(2 ** (bits - 1)), 2 ** (bits - 1), group or columns
        values = dice.integers(low, high, (rows, columns))
        scale = torch.from_numpy(dice.uniform(0.3, 0.5, (rows, columns // width)) / high).to(torch.bfloat16)
        zero = dice.integers(-2, 3, scale.shape) if not symmetric else np.zeros(scale.shape, np.int64)
        index = np.arange(columns) // width
        parts: Parts = {"weight_scale": scale}
        if reordered:
            index = dice.permutation(index)
            parts["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        if packed:
            parts |= {"weight_packed": packed_words(values, bits), "weight_shape": torch.tensor([rows, columns])}
            parts |= {} if symmetric else {"weight_zero_point": packed_words(zero.T, bits).T}
        else:
            parts["weight"] = torch.from_numpy(values.astype(np.int8))
            parts |= {} if symmetric else {"weight_zero_point": torch.from_numpy(zero.astype(np.int8))}
        return parts, np.asarray((values - zero[:, index]) * scale.float().numpy()[:, index], np.float32)

    return quantize


def packed_words(values: NDArray[np.int64], bits: int) -> torch.Tensor:
    """The rows as int32 words, the first value in the lowest bits, each plus half of its range."""
    rows, columns = values.shape
    per_word = 32 // bits
    words = np.zeros((rows, math.ceil(columns / per_word)), np.int64)
    for column in range(columns):
        words[:, column // per_word] |= (values[:, column] + 2 ** (bits - 1)) << (bits * (column % per_word))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors with one group of layers."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["score"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


# Sources: transformers' finegrained_fp8.py and fbgemm_fp8.py; the compressors of compressed-tensors.
FORMATS = {
    "fine-grained fp8": QuantizedFormat(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 40]},
        fp8(blocks(48, 40), "weight_scale_inv", torch.float32),
        "fp8 in 48 x 40 blocks",
    ),
    "fine-grained fp8 with powers of two": QuantizedFormat(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        fp8(blocks(32, 32), "weight_scale_inv", torch.float8_e8m0fnu),
        "fp8 in 32 x 32 blocks",
    ),
    "fp8 with static activations": QuantizedFormat(
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8(whole, "weight_scale", torch.float32),
        "fp8 with a scale per matrix or row",
        {"input_scale": torch.tensor(0.5)},
    ),
    "fbgemm fp8": QuantizedFormat(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        fp8(per_row, "weight_scale", torch.float32),
        "fp8 with a scale per matrix or row",
    ),
    "float-quantized": QuantizedFormat(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
        fp8(per_row, "weight_scale", torch.bfloat16),
        "fp8 with a scale per matrix or row",
        {"k_scale": torch.tensor(1.0), "v_scale": torch.tensor(1.0)},
    ),
    "int-quantized": QuantizedFormat(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        integers(8, None, packed=False),
        "int8 with a scale per matrix or row",
    ),
    "int-quantized with zero points": QuantizedFormat(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        integers(8, None, packed=False, symmetric=False),
        "int8 with a scale per matrix or row",
    ),
    "pack-quantized int4": QuantizedFormat(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=True),
        integers(4, 16, packed=True),
        "int4 with a scale per 16 weights",
    ),
    "pack-quantized int4 with zero points and an order": QuantizedFormat(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False, actorder="group"),
        integers(4, 32, packed=True, symmetric=False, reordered=True),
        "int4 with a scale per 32 weights",
    ),
    "pack-quantized int8": QuantizedFormat(
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        integers(8, None, packed=True),
        "int8 with a scale per matrix or row",
    ),
}
