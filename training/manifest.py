"""The manifest that a training run writes beside its model: base, data, recipe and results.

The service compares ``base`` and ``base_hash`` with a client's KL reference (see reward_client.provenance).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from reward_client.provenance import TRAINING_MANIFEST_FILE

from training.annotator_agreement import AnnotatorAgreement
from training.evaluation import Evaluation
from training.recipe import Recipe
from training.selection import PairCounts

_LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One training run."""

    base: str
    """The SFT checkpoint that the model was initialised from."""

    base_hash: str | None
    """Hash over the base's weights (see reward_client.provenance.base_hash); None if they are in no local folder."""

    data_hashes: Mapping[str, str]
    """SHA-256 of the training data, by source."""

    pairs: PairCounts
    recipe: Recipe

    num_steps: int
    """Optimizer steps of the run."""

    selected_step: int
    """The step whose weights are saved; less than ``num_steps`` only where early stopping selected it."""

    evaluations: Mapping[str, Evaluation]
    """Results on the evaluation data, by source."""

    adapter_hash: str | None = None
    """SHA-256 of the weights of the adapter whose training was continued; None where a new one was trained."""

    contrast_pairs: Mapping[str, int] = field(default_factory=dict)
    """Contrast pairs that were trained on beside ``pairs``, by family."""

    annotator_agreement: AnnotatorAgreement | None = None
    """Agreement of the annotators of the training data; None where no pair has two reviews."""

    def write(self, folder: Path) -> Path:
        """Write ``training.json`` into the model's folder, with the versions of the training libraries; return it."""
        content = dataclasses.asdict(self) | {"libraries": {name: version(name) for name in _LIBRARIES}}
        path = folder / TRAINING_MANIFEST_FILE
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path
