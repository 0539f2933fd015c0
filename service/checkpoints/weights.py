"""The safetensors files of a checkpoint folder: which ones count, what they hold, whether every number is finite.

It reads files and knows no architecture. Pickled weights are never opened: unpickling runs whatever code a file holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VALUE_HEAD_FILE = "value_head.safetensors"
"""Where LLaMA-Factory and others keep a value head apart from the model."""

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TRAINER_STATE = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "rng_state")
"""Pickles that trainers leave beside the weights: how their names begin."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor, as its file's header describes it. ``dtype`` in the words of safetensors: ``F32``, ``BF16``."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        product = 1
        for length in self.shape:
            product *= length
        return product


@dataclass(frozen=True, slots=True)
class ValueHead:
    """A scalar head under a name that is not the classifier's: one linear layer from the last hidden state to a number.

    ``weight`` and ``bias`` are the names of its tensors in ``file``; ``bias`` is None where the head has none.
    """

    file: Path
    weight: str
    bias: str | None

    @property
    def origin(self) -> str:
        """The training code that writes heads in this way."""
        if self.file.stem == "value_head":
            return "LLaMA-Factory"
        return "TRL" if "v_head." in self.weight else "OpenRLHF"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from the folder: the single one, or all shards of the index.

    Raises:
        CheckpointError: there are none, a shard is missing, the index is broken, or only pickled weights are there.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(folder, index)
    pickles = pickled_weights(folder)
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles only ({pickles[0].name}), which can run code when they are opened: "
            "save them as safetensors (save_pretrained does), or run `reward-convert --allow-pickle` if you trust them."
        )
    raise CheckpointError(f"{folder} holds no weights: put {SINGLE_FILE}, or {INDEX_FILE} with its shards, into it.")


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        shards = [folder / name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors shards: copy or save the checkpoint again."
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or len(shards) != len(names) or not shards:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {index.name} names"
            f"{f' (the first is {missing[0]})' if missing else ''}: copy or download the checkpoint again."
        )
    return shards


def pickled_weights(folder: Path) -> list[Path]:
    """Return the pickled weight files of a folder, in the order of their names; a trainer's own state is left out."""
    pickles = {path for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)}
    return sorted(path for path in pickles if not path.name.startswith(TRAINER_STATE))


def read_tensor_infos(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Return what the files hold by tensor name, from their headers alone.

    Raises:
        CheckpointError: a file is truncated or is not safetensors.
    """
    infos: dict[str, TensorInfo] = {}
    for file in files:
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118 - the handle is no mapping
                tensor = weights.get_slice(name)
                infos[name] = TensorInfo(file, tuple(tensor.get_shape()), tensor.get_dtype())
    return infos


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading tensor by tensor, on the CPU, mapped into memory.

    Raises:
        CheckpointError: the file is truncated or is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or damaged ({error}): copy or download it again, and compare its checksum."
        ) from error


def find_non_finite(files: Iterable[Path]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None; one tensor is in memory at a time."""
    import torch

    for file in files:
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118 - the handle is no mapping
                tensor = weights.get_tensor(name)
                # Minimum and maximum carry NaN along, and finding them takes one pass and no memory.
                if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    return str(name)
    return None


def hash_files(files: Sequence[Path]) -> str:
    """Return one sha256 over the names and bytes of the files, in the given order; they are read side by side."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_hash_file, files))
    return hashlib.sha256(
        "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)).encode()
    ).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_value_head(folder: Path, tensors: Mapping[str, TensorInfo], hidden_size: int) -> ValueHead | None:
    """Return the value head that training code left in the folder under a name of its own, or None.

    A tensor of shape [1, hidden_size] among ``tensors`` (those that the classifier has no place for) is one; so is the
    only such tensor of a ``value_head.safetensors`` beside the model.
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
    return ValueHead(tensors[weight].file, weight, bias if bias in tensors else None)
