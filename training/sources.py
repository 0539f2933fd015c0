"""Sources of rows: data files, folders of them, or data sets on the Hugging Face hub, and their hashes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from reward_client.hashing import file_sha256

from service.data.decoders import SUFFIXES
from service.data.reading import Example, Reading, Tell, parse_rows, read_examples
from service.data.rows import Row, dataset_files, read_rows
from service.errors import DatasetError

Source: TypeAlias = str | Path
"""A data file, a folder or glob pattern of them, or ``owner/name`` on the hub (``:split`` unless it is ``train``)."""

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(?::(?P<split>\w+))?")
DEFAULT_SPLIT = "train"


def read_source(source: Source) -> Iterator[Row]:
    """Yield the rows of a source, in its order.

    Raises:
        DatasetError: it does not exist, cannot be read, or cannot be downloaded; names file and row, never the text.
    """
    if not is_on_hub(source):
        yield from read_rows(Path(source))
        return
    for number, values in enumerate(_load_from_hub(str(source)), start=1):
        yield Row(dict(values), Path(str(source)), number)


def read_pair_rows(source: Source, tell: Tell | None = None) -> Iterator[Example]:
    """Yield the rows of a source with the pairs that they are; see `service.data.reading.read_examples`.

    Raises:
        DatasetError: as for `read_source`; a row is not a pair, or no row can be used.
    """
    if is_on_hub(source):
        return parse_rows(read_source(source), Reading(Path(str(source))), pairs_only=True, tell=tell)
    return read_examples(Path(source), pairs_only=True, tell=tell)


def source_name(source: Source) -> str:
    """Return the source's name in reports: a file's name without folder and ending, or a data set's id."""
    if is_on_hub(source):
        return str(source)
    name = Path(source).name
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def source_hashes(sources: Iterable[Source]) -> dict[str, str]:
    """Return SHA-256 by name: of a data file its bytes, of a data set on the hub its rows (as JSON, in order).

    A file goes by its name without the folder, or by its path where another file of that name came first.
    """
    hashes: dict[str, str] = {}
    for source in sources:
        if is_on_hub(source):
            hashes[str(source)] = _rows_hash(read_source(source))
            continue
        for file in dataset_files(Path(source)):
            hashes[str(file) if file.name in hashes else file.name] = file_sha256(file)
    return hashes


def is_on_hub(source: Source) -> bool:
    """Whether a source is a data set on the hub: a string that is no path and has the form of a hub id."""
    # A path that does not exist but ends like a data file is a mistyped path, not a data set on the hub.
    return (
        isinstance(source, str)
        and not Path(source).exists()
        and not source.lower().endswith(SUFFIXES)
        and _HUB_ID.fullmatch(source) is not None
    )


def _load_from_hub(source: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    match = _HUB_ID.fullmatch(source)
    name, split = (match["name"], match["split"]) if match else (source, None)
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(name, split=split or DEFAULT_SPLIT)
    except (OSError, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"{source} is not a local file, and could not be downloaded from the hub ({type(error).__name__}): check "
            "the name, the split and the network, or download it and pass its files."
        ) from error
    return rows


def _rows_hash(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
