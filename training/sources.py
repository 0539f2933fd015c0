"""Where rows come from: data files, folders of them, or a data set on the hub; read alike and hashed alike.

It knows places, not what a row means.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from service.data.rows import SUFFIXES, Row, dataset_files, read_rows
from service.errors import DatasetError

Source: TypeAlias = str | Path
"""A data file, a folder of them, or ``owner/name`` on the hub, with ``:split`` where that is not ``train``."""

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(?::(?P<split>\w+))?")
DEFAULT_SPLIT = "train"


def read_source(source: Source) -> Iterator[Row]:
    """Yield the rows of a source, in its order.

    Raises:
        DatasetError: it does not exist, cannot be read, or cannot be fetched; names the place, never the text.
    """
    if not _is_on_hub(source):
        yield from read_rows(Path(source))
        return
    for number, values in enumerate(_load_from_hub(str(source)), start=1):
        yield Row(dict(values), Path(str(source)), number)


def source_name(source: Source) -> str:
    """Return what the source is called in reports: a file's name without folders, a data set's id."""
    if _is_on_hub(source):
        return str(source)
    name = Path(source).name
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def source_hashes(sources: Iterable[Source]) -> dict[str, str]:
    """Return SHA-256 by name: of the bytes of each data file, of the rows (as JSON, in order) of a hub's data set."""
    hashes: dict[str, str] = {}
    for source in sources:
        if _is_on_hub(source):
            hashes[str(source)] = _rows_hash(read_source(source))
        else:
            hashes.update({file.name: file_hash(file) for file in dataset_files(Path(source))})
    return hashes


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_on_hub(source: Source) -> bool:
    # A path that does not exist but looks like a data file is a typing error, not somebody's data set.
    return (
        isinstance(source, str)
        and not Path(source).exists()
        and not source.endswith(SUFFIXES)
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
            f"{source} is no file here, and could not be fetched from the hub ({type(error).__name__}): check the "
            "name, the split and the network, or download it and pass its files."
        ) from error
    return rows


def _rows_hash(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
