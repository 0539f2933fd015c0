"""The safetensors files of a checkpoint folder: which ones are loaded, what they hold, whether all is finite.

This module reads files and does not depend on the architecture. Pickled weights are never opened, because unpickling
can run any code that a file contains.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_client.hashing import file_sha256

from service.checkpoints.bounds import check_file_size, check_headers
from service.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VALUE_HEAD_FILE = "value_head.safetensors"
"""Where LLaMA-Factory and others store a value head separately from the model."""

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TRAINER_STATE = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "rng_state")
"""Prefixes of the names of pickles that trainers write into the folder and that hold no weights."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor, as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]

    dtype: str
    """In the notation of safetensors: ``F32``, ``BF16``."""

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor; 1 for a scalar, whose shape is empty."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ValueHead:
    """A scalar head under another name than the classifier's: a linear layer from the last hidden state to a number."""

    file: Path
    """Holds both tensors."""

    weight: str
    """Name of the weight tensor."""

    bias: str | None
    """Name of the bias tensor; None where the head has no bias."""

    @property
    def origin(self) -> str:
        """The training library that stores heads under this name."""
        if self.file.stem == "value_head":
            return "LLaMA-Factory"
        return "TRL" if "v_head." in self.weight else "OpenRLHF"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from the folder: the single one, or all shards of the index.

    Raises:
        CheckpointError: there are none, a shard is missing, the index is invalid, or all weights are pickled.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(folder, index)
    pickles = pickled_weights(folder)
    if pickles:
        raise CheckpointError(
            f"{folder} has pickled weights only ({pickles[0].name}), and a pickle can run code when it is opened: "
            "save them as safetensors (save_pretrained does), or run `reward-convert --allow-pickle` if you trust them."
        )
    raise CheckpointError(f"{folder} has no weights: put {SINGLE_FILE}, or {INDEX_FILE} with its shards, into it.")


def _shards(folder: Path, index: Path) -> list[Path]:
    check_file_size(index)
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        shards = [folder / name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors shards: copy or save the checkpoint again."
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or len(shards) != len(names) or not shards:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {index.name} lists"
            f"{f' (the first is {missing[0]})' if missing else ''}: copy or download the checkpoint again."
        )
    return shards


def pickled_weights(folder: Path) -> list[Path]:
    """Return the pickled weight files of a folder, sorted by name, without the state files of trainers."""
    pickles = {path for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)}
    return sorted(path for path in pickles if not path.name.startswith(TRAINER_STATE))


def read_tensor_infos(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Return the tensors of the files by name; only the headers are read.

    Raises:
        CheckpointError: a file is truncated, is not a safetensors file, or the files have more tensors than any model.
    """
    infos: dict[str, TensorInfo] = {}
    files = list(files)
    check_headers(files)
    for file in files:
        # Headers need no framework, and importing torch takes seconds.
        with open_weights(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 - the handle is not a mapping
                tensor = weights.get_slice(name)
                infos[name] = TensorInfo(file, tuple(tensor.get_shape()), tensor.get_dtype())
    return infos


@contextmanager
def open_weights(file: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file for reading tensor by tensor, on the CPU, mapped into memory.

    Args:
        file: the file.
        framework: whose tensors are returned: ``pt`` for torch, ``np`` for NumPy.

    Raises:
        CheckpointError: the file is truncated or is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework=framework) as weights:
            yield weights
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or damaged ({error}): copy or download it again, and compare its checksum."
        ) from error


def find_non_finite(files: Iterable[Path]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, or None; one tensor is in memory at a time."""
    import torch

    for file in files:
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118 - the handle is not a mapping
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and tensor.itemsize == 1:
                    tensor = tensor.float()  # torch has no reductions of fp8
                # Minimum and maximum propagate NaN, and computing them takes one pass and no additional memory.
                if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    return str(name)
    return None


def weights_sha256(files: Sequence[Path]) -> str:
    """Return one sha256 over the names and bytes of the weight files that a classifier is loaded from.

    It is the sha256 of one line per file, in the given order: name, space, sha256 of the bytes. Calibrations and
    bundles are bound to this value. ``base_hash`` of `reward_client.provenance`, which training manifests record, is
    another value over the same files.

    Args:
        files: as `weight_files` returns them; they are read in parallel.
    """
    digests = files_sha256(files)
    return hashlib.sha256("".join(f"{file.name} {digest}\n" for file, digest in digests.items()).encode()).hexdigest()


def files_sha256(files: Sequence[Path]) -> dict[Path, str]:
    """Return the sha256 of each file, in the given order; they are read in parallel."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(files, pool.map(file_sha256, files), strict=True))


def find_value_head(folder: Path, tensors: Mapping[str, TensorInfo], hidden_size: int) -> ValueHead | None:
    """Return the value head that a training library stored in the folder under another name, or None.

    It is the only tensor of shape [1, hidden_size] among ``tensors``, or else the only such tensor of a
    ``value_head.safetensors`` in the folder. The last layer of a deeper head is none.

    Args:
        folder: the checkpoint folder.
        tensors: the stored tensors that the classifier does not use.
        hidden_size: width of the last hidden state.

    Raises:
        CheckpointError: ``value_head.safetensors`` is truncated or is not a safetensors file.
    """
    head = _value_head_among(tensors, hidden_size)
    separate = folder / VALUE_HEAD_FILE
    if head is None and separate.is_file():
        head = _value_head_among(read_tensor_infos([separate]), hidden_size)
    return head


def _value_head_among(tensors: Mapping[str, TensorInfo], hidden_size: int) -> ValueHead | None:
    names = [name for name, info in tensors.items() if info.shape == (1, hidden_size) and name.endswith("weight")]
    if len(names) != 1:
        return None
    weight = names[0]
    bias = weight.removesuffix("weight") + "bias"
    module = weight.partition(".")[0] + "."
    if any(name.startswith(module) and name not in {weight, bias} for name in tensors):
        return None  # it is the last layer of a deeper head
    return ValueHead(tensors[weight].file, weight, bias if bias in tensors else None)
