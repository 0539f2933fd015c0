"""The record that a training run leaves beside its model: from what, how, and with what result.

``base`` and ``base_hash`` are what the service answers from when a client asks about its KL reference
(reward_client.provenance).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from reward_client.provenance import MANIFEST_FILE

from training.agreement import Agreement
from training.evaluation import Evaluation
from training.recipe import Recipe
from training.selection import PairCounts

_LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One training run.

    ``base``: the SFT checkpoint that the model was initialised from. ``base_hash``: SHA-256 over its weights, None if
    they are in no local folder. ``data_hashes``: SHA-256 by source. ``num_steps``: optimizer steps that were made;
    ``kept_step``: the one whose weights were kept, less only where early stopping found a better one. ``evaluations``:
    by source. ``agreement``: of the reviewers of the training data, None where no pair has two.
    """

    base: str
    base_hash: str | None
    data_hashes: Mapping[str, str]
    pairs: PairCounts
    recipe: Recipe
    num_steps: int
    kept_step: int
    evaluations: Mapping[str, Evaluation]
    agreement: Agreement | None = None

    def write(self, folder: Path) -> Path:
        """Write ``training.json`` into the model's folder, with the versions of the libraries that trained it."""
        content = dataclasses.asdict(self) | {"libraries": {name: version(name) for name in _LIBRARIES}}
        path = folder / MANIFEST_FILE
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path
