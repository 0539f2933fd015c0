"""Widens the quantized weights of a checkpoint to floating point: (stored value - zero point) x scale, in float32.

A quantized matrix is several stored tensors (values, scales, zero points). `QuantizedTensors` finds them by their names
and presents the matrices under the names and shapes that they have in an unquantized checkpoint. Scales of activations
are left out, because activations are not quantized here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from service.checkpoints.quantization_format import StoredQuantization, WeightScheme, read_quantization
from service.checkpoints.weights import TensorInfo, open_weights, read_tensor_infos, weight_files
from service.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SCALE = re.compile(r"(?P<matrix>.+)_scale(_inv)?")
"""The name of the scales of a matrix: ``weight_scale_inv`` of fine-grained fp8, else ``weight_scale``; both
multiply."""

ACTIVATION_SCALE = re.compile(r"(.+\.)?(input|output|activation|q|k|v)_(scale|zero_point)")
"""Names of scales of activations and of cached keys and values."""

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """The stored tensors of one matrix."""

    scheme: WeightScheme
    shape: tuple[int, ...]
    """Of the widened matrix: [..., rows, columns]."""

    values: str
    scale: str
    zero_point: str | None
    group_index: str | None
    """Name of the tensor with the index of each column's group; None: groups are consecutive columns."""

    @property
    def part_names(self) -> frozenset[str]:
        """The names of all its tensors."""
        return frozenset(filter(None, (self.values, self.scale, self.zero_point, self.group_index)))

    def widen(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return the matrix in float32.

        Args:
            read: returns a stored tensor by its name.
        """
        values = self._unpacked(read(self.values), self.shape[-1]) if self.scheme.is_packed else read(self.values)
        values = values.float()
        columns = None if self.group_index is None else self._group_index(read(self.group_index))
        if self.zero_point is not None:
            zero_point = read(self.zero_point)
            if self.scheme.is_packed and not self.scheme.is_symmetric:
                zero_point = self._unpacked(zero_point.mT, self.shape[-2]).mT
            values -= self._expanded(zero_point.float(), columns)
        return values * self._expanded(read(self.scale).float(), columns)

    def _group_index(self, stored: torch.Tensor) -> torch.Tensor | None:
        """Return the index of each column's group; None where it was never set (-1), so that groups are consecutive."""
        return None if (stored < 0).any() else stored.long()

    def _unpacked(self, packed: torch.Tensor, num_columns: int) -> torch.Tensor:
        """Return the signed integers in int32 words [rows, words]; each is stored plus half of its range."""
        import torch

        bits = self.scheme.num_bits
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        values = (packed[..., None] >> shifts) & (2**bits - 1)
        unpacked: torch.Tensor = values.flatten(-2)[..., :num_columns] - 2 ** (bits - 1)
        return unpacked

    def _expanded(self, grid: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """Return scales or zero points in a shape that broadcasts with the matrix."""
        if grid.numel() == 1:
            return grid.flatten()
        if self.scheme.block is None:
            return grid
        num_rows, num_columns = self.shape[-2:]
        rows_of_block, columns_of_block = self.scheme.block
        grid = grid.repeat_interleave(rows_of_block, dim=-2)[..., :num_rows, :]
        if columns is not None:
            return grid[..., columns]
        return grid.repeat_interleave(columns_of_block, dim=-1)[..., :num_columns]


@dataclass(frozen=True, slots=True)
class QuantizedTensors:
    """The quantized matrices of a checkpoint, and its other tensors."""

    quantization: StoredQuantization
    matrices: Mapping[str, QuantizedTensor]
    """By the name of the weight in an unquantized checkpoint."""

    others: Mapping[str, TensorInfo]
    """Stored tensors that are not quantized."""

    infos: Mapping[str, TensorInfo]
    """All tensors as an unquantized checkpoint would describe them; dtypes of matrices are those of stored values."""

    def read(
        self, read: Callable[[str], torch.Tensor], dtype_of: Callable[[str], torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """Return all tensors by name, the matrices widened.

        Args:
            read: returns a stored tensor by its name.
            dtype_of: dtype of a widened matrix by its name; it is computed in float32 and rounded once.
        """
        widened = {name: matrix.widen(read).to(dtype_of(name)) for name, matrix in self.matrices.items()}
        return {name: read(name) for name in self.others} | widened


def find_quantized(folder: Path, stored: Mapping[str, TensorInfo]) -> QuantizedTensors | None:
    """Return the quantized matrices of a checkpoint folder; None where nothing is quantized.

    Args:
        folder: with the configuration.
        stored: its stored tensors by name.

    Raises:
        CheckpointError: the format is not widened, tensors do not match it, or fp8 weights have no scales.
    """
    quantization = read_quantization(folder)
    if quantization is None:
        _refuse_unscaled(folder, stored)
        return None
    matrices = dict(_matrices(folder, quantization, stored))
    parts = frozenset().union(*(matrix.part_names for matrix in matrices.values()))
    shapes = {f"{name}_shape" for name, matrix in matrices.items() if matrix.scheme.is_packed}
    others = {
        name: info
        for name, info in stored.items()
        if name not in parts | shapes and not ACTIVATION_SCALE.fullmatch(name)
    }
    _refuse_unscaled(folder, others)
    infos = {
        name: replace(stored[matrix.values], shape=matrix.shape, dtype="I4" if matrix.scheme.num_bits == 4 else dtype)
        for name, matrix in matrices.items()
        for dtype in ["I8" if matrix.scheme.is_packed else stored[matrix.values].dtype]
    }
    return QuantizedTensors(quantization, matrices, others, others | infos)


def read_widened(folder: Path, dtype_of: Callable[[str], torch.dtype]) -> dict[str, torch.Tensor] | None:
    """Return all tensors of a validated checkpoint folder with its matrices widened; None: nothing is quantized.

    Args:
        folder: the checkpoint folder.
        dtype_of: see `QuantizedTensors.read`.
    """
    stored = read_tensor_infos(weight_files(folder))
    quantized = find_quantized(folder, stored)
    return None if quantized is None else quantized.read(_reader(stored), dtype_of)


def read_in_float32(folder: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return some tensors of a validated checkpoint folder in float32; quantized matrices are widened."""
    stored = read_tensor_infos(weight_files(folder))
    quantized = find_quantized(folder, stored)
    matrices = {} if quantized is None else quantized.matrices
    read = _reader(stored)
    return {name: matrices[name].widen(read) if name in matrices else read(name).float() for name in names}


def _reader(stored: Mapping[str, TensorInfo]) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        with open_weights(stored[name].file) as weights:
            tensor: torch.Tensor = weights.get_tensor(name)
            return tensor

    return read


def _refuse_unscaled(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        is_integer = name.endswith("weight") and info.dtype.startswith(("I", "U"))
        if not is_integer and not info.dtype.startswith(("F8_", "F4", "F6")):
            continue
        raise CheckpointError(
            f"{folder} stores {name} as {info.dtype} without the scales that its configuration would name: "
            "take config.json and weights from the same model."
        )


def _matrices(
    folder: Path, quantization: StoredQuantization, stored: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, QuantizedTensor]]:
    for name in stored:
        match = SCALE.fullmatch(name)
        if match is None or ACTIVATION_SCALE.fullmatch(name):
            continue
        matrix = match["matrix"]
        packed = f"{matrix}_packed"
        values = packed if packed in stored else matrix
        if values in stored:
            yield matrix, _matrix(folder, quantization, stored, matrix, values, name)


def _matrix(
    folder: Path,
    quantization: StoredQuantization,
    stored: Mapping[str, TensorInfo],
    name: str,
    values: str,
    scale: str,
) -> QuantizedTensor:
    zero_point, group_index = (part if part in stored else None for part in (f"{name}_zero_point", f"{name}_g_idx"))
    shape = _shape(folder, stored, name, values)
    for scheme in quantization.schemes:
        found = QuantizedTensor(scheme, shape, values, scale, zero_point, group_index)
        if _has_scheme(found, stored):
            return found
    parts = ", ".join(f"{part} {list(stored[part].shape)} {stored[part].dtype}" for part in (values, scale))
    raise CheckpointError(
        f"The weights of {folder} do not match its quantization_config ({quantization}): {parts}; take config.json and "
        "weights from the same model."
    )


def _shape(folder: Path, stored: Mapping[str, TensorInfo], name: str, values: str) -> tuple[int, ...]:
    if values == name:
        return stored[name].shape
    shape = f"{name}_shape"
    if shape not in stored:
        raise CheckpointError(f"{folder} has no {shape} for {values}: copy or save the checkpoint again.")
    with open_weights(stored[shape].file) as weights:
        return tuple(int(size) for size in weights.get_tensor(shape))


def _has_scheme(matrix: QuantizedTensor, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether the shapes and dtypes of a matrix's tensors are those of its scheme."""
    scheme, values, scale = matrix.scheme, stored[matrix.values], stored[matrix.scale]
    if len(matrix.shape) < 2 or scale.dtype not in SCALE_DTYPES:
        return False
    *leading, rows, columns = matrix.shape
    if scheme.is_packed:
        words = -(-columns * scheme.num_bits // 32)
        has_values = values.dtype == "I32" and values.shape == (*leading, rows, words)
    else:
        has_values = values.dtype in (FLOAT8 if scheme.is_float else ("I8",))
    return has_values and _has_scales(matrix, scale.shape) and _has_zero_point(matrix, stored)


def _has_scales(matrix: QuantizedTensor, shape: tuple[int, ...]) -> bool:
    *leading, rows, columns = matrix.shape
    if matrix.scheme.block is None:
        broadcasts = len(shape) == len(matrix.shape) and all(
            size in {1, full} for size, full in zip(shape, matrix.shape, strict=True)
        )
        return matrix.group_index is None and (shape in {(), (1,)} or broadcasts)
    rows_of_block, columns_of_block = matrix.scheme.block
    return shape == (*leading, -(-rows // rows_of_block), -(-columns // columns_of_block))


def _has_zero_point(matrix: QuantizedTensor, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether zero points are stored where the scheme has them, one for each scale, packed along the rows if at all."""
    if matrix.zero_point is None:
        return matrix.scheme.is_symmetric
    info, scale = stored[matrix.zero_point], stored[matrix.scale]
    if matrix.scheme.is_packed and not matrix.scheme.is_symmetric:
        *leading, rows, groups = scale.shape
        return info.dtype == "I32" and info.shape == (*leading, -(-rows * matrix.scheme.num_bits // 32), groups)
    return info.shape == scale.shape
