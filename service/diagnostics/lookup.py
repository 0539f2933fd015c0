"""Finds the calibration of the served model, and reports why one that was found is not used.

With another model, other settings or another engine its p-values would not be calibrated, so it is refused, and
requests are scored without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.checkpoints.checkpoint import Checkpoint
from service.checkpoints.demo import merged_identity
from service.checkpoints.files import CALIBRATION_FILE
from service.diagnostics.calibration import Binding, Calibration, read_calibration
from service.edits.probe import Probe
from service.errors import CalibrationError
from service.records import StateTap

logger = logging.getLogger(__name__)

SHOWN_FACTS = (
    "created",
    "num_prompts",
    "num_fit",
    "num_select",
    "num_calibrate",
    "admitted",
    "self_test",
    "weak",
    "mean_auroc",
    "length",
    "heads",
    "new_kind_auroc",
)
"""Fields of `CalibrationFacts` in ``/v1/model``."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """The result of the search: a calibration that may be used, or the reason why there is none."""

    calibration: Calibration | None
    reason: str | None = None

    @property
    def taps(self) -> tuple[StateTap, ...]:
        """Where the engine must be able to read states."""
        return self.calibration.states.taps if self.calibration else ()

    def checked(self, available: tuple[StateTap, ...], arithmetic: dict[str, str]) -> Lookup:
        """Return the lookup once the engine is known: without the calibration if the engine lacks a tap.

        Another arithmetic changes rewards and states by rounding only, so it causes a warning.

        Args:
            available: taps that the engine reads.
            arithmetic: engine, dtype and forward path that are served.
        """
        calibration = self.calibration
        if calibration is None:
            return self
        if not set(self.taps) <= set(available):
            return _refused("the engine cannot read the hidden states that it needs")
        changed = [name for name, value in arithmetic.items() if calibration.arithmetic.get(name) != value]
        if changed:
            logger.warning("The calibration was made with another %s.", " and ".join(changed))
        return self

    def description(self) -> dict[str, Any]:
        """Return what is used, or why nothing is, as JSON-ready values for ``/v1/model``."""
        calibration = self.calibration
        if calibration is None:
            return {"id": None, "reason": self.reason}
        facts = calibration.facts.as_json()
        taps = [f"{tap.pooling}@{tap.layer}" for tap in self.taps]
        detection = facts["suite"].get("combined", {})
        shown = {name: facts[name] for name in SHOWN_FACTS}
        return {
            "id": calibration.id,
            "reason": None,
            "taps": taps,
            **shown,
            "detection": detection,
            "probe": None if calibration.probe is None else _described(calibration.probe),
        }


def binding_of(checkpoint: Checkpoint, *, template: str, reward_weights: Mapping[str, float] | None = None) -> Binding:
    """Return the binding of a calibration of this checkpoint under these settings.

    Args:
        checkpoint: the opened checkpoint.
        template: name of its text rule.
        reward_weights: weights of the settings, by the name of the output; those of the checkpoint are in its hash.
    """
    hashes = checkpoint.hashes
    return Binding(
        weights=merged_identity(checkpoint.path, hashes.weights),
        config=hashes.config,
        tokenizer=hashes.tokenizer,
        chat_template=hashes.template,
        template=template,
        max_input_tokens=checkpoint.max_input_tokens,
        pooling=checkpoint.pooling,
        vocab_size=checkpoint.embedding_size,
        reward_weights="" if reward_weights is None else json.dumps(dict(reward_weights), sort_keys=True),
    )


def find_calibration(folder: Path, named: str | None, binding: Binding) -> Lookup:
    """Look for a calibration that is valid for this binding.

    Args:
        folder: the checkpoint folder.
        named: the file that the settings name; None: the default file in the folder.
        binding: binding of the served model.
    """
    path = Path(named).expanduser() if named else folder / CALIBRATION_FILE
    if not path.is_file():
        if named:
            return _refused(f"there is no file {path}")
        return Lookup(None, "The checkpoint has no calibration; reward-calibrate makes one.")
    try:
        calibration = read_calibration(path)
    except CalibrationError as error:
        return _refused(str(error).replace(str(path), named or CALIBRATION_FILE))  # the folder may be in a cache
    differences = binding.differences(calibration.binding)
    if differences:
        return _refused(f"it was made for a model that differs in {', '.join(differences).replace('_', ' ')}")
    return Lookup(calibration)


def without_calibration(reason: str) -> Lookup:
    """Return a lookup without a calibration, with the reason why none was searched for."""
    return Lookup(None, reason)


def _described(probe: Probe) -> dict[str, Any]:
    """Return a probe as JSON-ready values, with the edits that pay by name, the largest effect first."""
    return {"pays": list(dict.fromkeys(one.edit for one in probe.paying())), **probe.as_json()}


def _refused(reason: str) -> Lookup:
    lookup = Lookup(None, f"The calibration is not used: {reason}.".replace("..", "."))
    logger.warning("%s", lookup.reason)
    return lookup
