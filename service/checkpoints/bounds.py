"""Bounds on the files of a checkpoint folder, checked before anything of the size that they name is made.

A configuration of a few bytes can name a model of a billion layers, and a header of weights can hold millions of
tensors. Nothing here imports transformers or torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.errors import CheckpointError

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Of a configuration or an index of weights."""

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
"""Of a file of a tokenizer; the largest vocabularies take about 40 MB."""

MAX_NESTING = 64
"""Levels of lists and objects in a configuration."""

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""Of one file of weights."""

MAX_TENSORS = 262_144
"""Of all files of weights together; mixtures of experts with a file for each matrix have about 150,000."""

MAX_LAYERS = 1_024

MAX_COUNT = 65_536
"""Labels, heads or experts."""

MAX_POSITIONS = 16_777_216

_LAYERS = re.compile(r"(\w*_)?layers?|\w*_blocks|num_hidden_groups|inner_group_num|block_(sizes|repeats)|depths")
_COUNTS = re.compile(r"(num|n)_(\w+_)?(labels|heads|experts|shared_experts|groups)|(\w+_)?num_experts|\w*_heads")
_POSITIONS = re.compile(r"\w*position_embeddings|n_positions|n_ctx|(max_)?seq(uence)?_len(gth)?")
_LIMITS = ((_LAYERS, MAX_LAYERS, "layers"), (_COUNTS, MAX_COUNT, "parts"), (_POSITIONS, MAX_POSITIONS, "positions"))
"""What an entry of a configuration counts, by its name."""

_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_HUB_NAME = re.compile(r"[^/\s]+/[^/\s]+")


def check_file_size(file: Path, limit: int = MAX_JSON_BYTES) -> None:
    """Refuse a file that is larger than any of its kind.

    Raises:
        CheckpointError: it is; a file that does not exist passes.
    """
    size = file.stat().st_size if file.is_file() else 0
    if size > limit:
        raise CheckpointError(f"{file} has {size:,} bytes; the limit is {limit:,}: copy or save the checkpoint again.")


def check_nesting(file: Path, content: Any) -> None:
    """Refuse values that are nested deeply, which recursive code cannot read.

    Raises:
        CheckpointError: they have more than ``MAX_NESTING`` levels.
    """
    level = [content]
    for _ in range(MAX_NESTING):
        level = [entry for value in level for entry in _entries(value)]
        if not level:
            return
    raise too_deep(file)


def too_deep(file: Path) -> CheckpointError:
    """Return the refusal of a file whose values are nested deeply."""
    return CheckpointError(f"{file} is nested in more than {MAX_NESTING} levels: copy or save the checkpoint again.")


def check_configuration(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse a configuration that names a model larger than any, or a kernel that would be downloaded.

    Args:
        file: the configuration, for messages.
        content: its content.

    Raises:
        CheckpointError: it does; the message has the entry.
    """
    for key, value in _named_entries(content):
        if _IMPLEMENTATION.fullmatch(key) and any(map(_HUB_NAME.fullmatch, _texts(value))):
            raise CheckpointError(
                f"{file} has the {key} of a kernel on a hub, which is never downloaded: remove the entry."
            )
        number = _total(value)
        for names, limit, noun in _LIMITS:
            if number > limit and names.fullmatch(key):
                raise CheckpointError(
                    f"{file} has a {key} of {number:,}; a model may have {limit:,} {noun}: take {file.name} from the "
                    "model that was trained."
                )


def check_headers(files: Iterable[Path]) -> None:
    """Refuse files of weights whose headers are too large, before they are parsed.

    Raises:
        CheckpointError: they are; a file that is too short passes.
    """
    num_tensors = 0
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > MAX_HEADER_BYTES and size <= file.stat().st_size:
                raise CheckpointError(
                    f"{file} has a header of {size:,} bytes; the limit is {MAX_HEADER_BYTES:,}: save the weights again."
                )
            # Every tensor is an object in the header, and a brace of JSON's own cannot be written otherwise.
            num_tensors += stream.read(min(size, MAX_HEADER_BYTES)).count(b"{")
        if num_tensors > MAX_TENSORS:
            raise CheckpointError(
                f"{file.parent} has more than {MAX_TENSORS:,} tensors, which no model has: save the weights again."
            )


def _entries(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _named_entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        yield key, value
        for entry in (value, *(value if isinstance(value, list) else ())):
            if isinstance(entry, Mapping):
                yield from _named_entries(entry)


def _texts(value: Any) -> list[str]:
    values = value.values() if isinstance(value, Mapping) else [value]
    return [text for text in values if isinstance(text, str)]


def _total(value: Any) -> float:
    """Return a number, or the sum of a list of numbers; 0 of anything else."""
    numbers = value if isinstance(value, list) else [value]
    return sum(number for number in numbers if isinstance(number, int | float) and not isinstance(number, bool))
