"""How a quantized checkpoint stores its weights, read from the entry ``quantization_config`` of its configuration.

Formats that are documented and lose nothing when they are widened are described by a `StoredQuantization`; any other is
refused by name. This module opens no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.checkpoints.configuration import read_json
from service.checkpoints.files import CONFIG_FILE
from service.errors import CheckpointError

WIDENED = "fp8 (fp8, fbgemm_fp8) and compressed-tensors with 4-bit or 8-bit integers or fp8"
"""What is widened, for messages."""

COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
"""Storage formats of compressed-tensors that hold integers or fp8 with scales in floating point."""

DEQUANTIZED_BY_TRANSFORMERS = frozenset({"bitsandbytes", "mxfp4", "mxfp8", "hqq", "quanto", "torchao"})
"""Methods whose models transformers can load where their library is installed, and dequantize."""


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How one kind of weight matrix is stored."""

    num_bits: int
    """Bits of a stored weight: 4 or 8."""

    is_float: bool
    """Whether it is fp8 (E4M3 or E5M2); otherwise it is a signed integer."""

    block: tuple[int, int] | None = None
    """Rows and columns that have one scale; None: one scale per matrix or per row."""

    is_packed: bool = False
    """Whether integers are packed into int32, the first in the lowest bits."""

    is_symmetric: bool = True
    """Whether there is no zero point; a packed matrix then has packed zero points too."""

    def __str__(self) -> str:
        number = "fp8" if self.is_float else f"int{self.num_bits}"
        if self.block is None:
            return f"{number} with a scale per matrix or row"
        rows, columns = self.block
        return f"{number} with a scale per {columns} weights" if rows == 1 else f"{number} in {rows} x {columns} blocks"


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How the weights of a checkpoint are stored."""

    method: str
    """``quant_method`` of the configuration."""

    schemes: tuple[WeightScheme, ...]
    """Its kinds of matrices; which one a matrix has follows from the shapes of its tensors."""

    def __str__(self) -> str:
        return f"{self.method}: {', '.join(dict.fromkeys(map(str, self.schemes)))}"


def read_quantization(folder: Path) -> StoredQuantization | None:
    """Return how the weights of a checkpoint folder are stored; None where they are not quantized.

    Sources: transformers' ``FineGrainedFP8Config`` and ``FbgemmFp8Config``, and ``QuantizationConfig`` of
    compressed-tensors.

    Raises:
        CheckpointError: the format is not widened; the message names it and the way out.
    """
    config = read_json(folder / CONFIG_FILE)
    text_config = config.get("text_config")
    content = config.get("quantization_config")
    if content is None and isinstance(text_config, Mapping):
        content = text_config.get("quantization_config")
    if content is None:
        return None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"quantization_config of {folder / CONFIG_FILE} is not an object: save the model again.")
    method = str(content.get("quant_method", "")).lower()
    try:
        if method == "fp8":
            return StoredQuantization(method, (_fine_grained_scheme(content),))
        if method == "fbgemm_fp8":
            return StoredQuantization(method, (WeightScheme(8, is_float=True),))
        if method == "compressed-tensors":
            return StoredQuantization(method, tuple(_compressed_schemes(content)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"quantization_config of {folder / CONFIG_FILE} is not one of {method} ({type(error).__name__}: {error}): "
            "copy or save the checkpoint again."
        ) from error
    except _UnknownFormatError as error:
        raise CheckpointError(_refusal(folder, method, str(error))) from None
    raise CheckpointError(_refusal(folder, method or "a method without a name", ""))


def refuse_quantized(folder: Path, purpose: str) -> None:
    """Check that a model is not stored quantized, because transformers would load its weights in another way.

    Args:
        folder: the checkpoint folder.
        purpose: what the model would be used as, for the message.

    Raises:
        CheckpointError: it is.
    """
    if (folder / CONFIG_FILE).is_file() and read_quantization(folder) is not None:
        raise CheckpointError(
            f"{folder} is stored quantized, so it cannot be {purpose}: take the unquantized model that it was made "
            "from."
        )


class _UnknownFormatError(Exception):
    """A documented method with a format that is not widened; the text names the format."""


def _refusal(folder: Path, method: str, detail: str) -> str:
    name = f"{method} ({detail})" if detail else method
    remedy = "serve the unquantized model that it was made from"
    if method in DEQUANTIZED_BY_TRANSFORMERS:
        remedy += ", or load it with transformers where its library is installed, call dequantize() and save it again"
    return f"{folder} is stored quantized by {name}; the service widens {WIDENED} only: {remedy}."


def _fine_grained_scheme(content: Mapping[str, Any]) -> WeightScheme:
    block = content.get("weight_block_size")
    return WeightScheme(8, is_float=True, block=None if block is None else _block(block))


def _block(sizes: Any) -> tuple[int, int]:
    rows, columns = (int(size) for size in sizes)
    if min(rows, columns) < 1:
        raise ValueError(f"a block of {rows} x {columns} weights")
    return rows, columns


def _compressed_schemes(content: Mapping[str, Any]) -> Iterator[WeightScheme]:
    """Yield the scheme of each group of layers.

    Raises:
        _UnknownFormatError: one is not widened.
    """
    sparsity = (content.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _UnknownFormatError(f"sparsity format {sparsity}")
    if (content.get("transform_config") or {}).get("config_groups"):
        raise _UnknownFormatError("with transforms of weights and activations")
    for group in content["config_groups"].values():
        stored = group.get("format") or content["format"]
        if stored not in COMPRESSED_FORMATS:
            raise _UnknownFormatError(f"format {stored}")
        if group.get("weights") is not None:
            yield _compressed_scheme(group["weights"], is_packed=stored == "pack-quantized")


def _compressed_scheme(weights: Mapping[str, Any], *, is_packed: bool) -> WeightScheme:
    num_bits, is_float = int(weights.get("num_bits", 8)), weights.get("type", "int") == "float"
    if num_bits != 8 and (is_float or not is_packed or num_bits != 4):
        raise _UnknownFormatError(f"{'floats' if is_float else 'integers'} of {num_bits} bits")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    block: tuple[int, int] | None = None
    if strategy == "group":
        block = _block((1, weights["group_size"]))
    elif strategy == "block":
        block = _block(weights["block_structure"])
    elif strategy not in {"tensor", "channel"}:
        raise _UnknownFormatError(f"strategy {strategy}")
    return WeightScheme(num_bits, is_float, block, is_packed, bool(weights.get("symmetric", True)))
