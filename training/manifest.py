"""The record that a training run leaves beside its model: from what, how, and with what result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from service.dataset import dataset_files
from training.evaluation import Evaluation
from training.recipe import Recipe
from training.selection import PairCounts

MANIFEST_FILE = "training.json"
_LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One training run.

    ``base_hash``: SHA-256 over the base's weights, None if they are not in a local folder. ``data_hashes``: SHA-256 by
    file name. ``evaluations``: by file name.
    """

    base: str
    base_hash: str | None
    data_hashes: Mapping[str, str]
    pairs: PairCounts
    recipe: Recipe
    evaluations: Mapping[str, Evaluation]

    def write(self, folder: Path) -> Path:
        """Write ``training.json`` into the model's folder, with the versions of the libraries that trained it."""
        content = dataclasses.asdict(self) | {"libraries": {name: version(name) for name in _LIBRARIES}}
        path = folder / MANIFEST_FILE
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def data_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each data file (of a folder: each file in it) by its name without folders."""
    return {file.name: file_hash(file) for path in paths for file in dataset_files(path)}


def weights_hash(base: Path) -> str | None:
    """Return the SHA-256 over a checkpoint folder's safetensors files in name order; None where there are none."""
    hashes = [file_hash(file) for file in sorted(base.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
