"""``reward_model.json``: how a reward is computed from a checkpoint, where its class in transformers does not say it.

It stands beside the weights and describes the head, the pooling, and what is appended to a text. ``reward-convert`` and
``reward-train`` write it, and it may be written by hand. A checkpoint without the file is computed as transformers'
classifier does. This module reads and writes the file and opens no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from service.checkpoints.described_heads import (
    ClassifierHead,
    EnsembleHead,
    GatedHead,
    Head,
    LayeredHead,
    LinearLayer,
    Readout,
)
from service.errors import CheckpointError, SettingsError
from service.records import Pooling

__all__ = [
    "ClassifierHead",
    "EnsembleHead",
    "GatedHead",
    "Head",
    "LayeredHead",
    "LinearLayer",
    "Readout",
]

DESCRIPTION_FILE = "reward_model.json"
FORMAT_VERSION = 1

LATER_FIELDS = frozenset({"readout", "combine", "steps"})
"""Optional fields that were added to the format; left out, they do not change the version of a model."""


class TextRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What training did to a text that neither the tokenizer nor the chat template does."""

    append_token_ids: tuple[int, ...] = ()
    """Token ids that stand after every text, such as a reward token whose state the head reads."""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the checkpoint was made from; changes no reward."""

    layout: str
    """Name of the layout that was recognised, or of the command that trained the model."""

    architecture: str | None = None
    """The class that the source's configuration names."""


class RewardDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``reward_model.json``."""

    head: Head
    format_version: int = FORMAT_VERSION

    outputs: tuple[str, ...] = ("reward",)
    """Names of the numbers that the head gives, in order; one where there is a readout."""

    readout: Readout | None = None
    """How the logits of the head become one number; None: its numbers are the outputs."""

    pooling: Pooling = "hf"
    """The token whose hidden state the head reads."""

    text: TextRule = TextRule()
    source: Provenance | None = None

    def reward_facts(self) -> dict[str, Any]:
        """Return what changes a reward, as JSON-ready values; empty where it is what holds without the file."""
        facts = _facts(msgspec.structs.replace(self, source=None))
        return {} if facts == _facts(RewardDescription(ClassifierHead())) else facts

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        return content


def _facts(description: RewardDescription) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(description)
    return {name: value for name, value in facts.items() if value is not None or name not in LATER_FIELDS}


def read_description(folder: Path) -> RewardDescription | None:
    """Return the description in a checkpoint folder; None without one.

    Raises:
        CheckpointError: the file is invalid, of another format version, or describes what is not supported.
    """
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        return None
    try:
        content = file.read_bytes()
        version = msgspec.json.decode(content, type=dict[str, object]).get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {version}, but this service reads {FORMAT_VERSION}: run `reward-convert`."
            )
        description = msgspec.json.decode(content, type=RewardDescription)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{file} is not a valid description of a reward model ({error}).") from error
    if not description.outputs or len(set(description.outputs)) != len(description.outputs):
        raise CheckpointError(f"{file} names an output twice, or none: give each output a name of its own.")
    return description


def write_description(folder: Path, description: RewardDescription) -> None:
    """Write the description into a checkpoint folder."""
    content = msgspec.json.format(msgspec.json.encode(description), indent=2)
    (folder / DESCRIPTION_FILE).write_bytes(content + b"\n")


def refuse_described_head(folder: Path, purpose: str) -> None:
    """Check that a model's head is the classifier's, because transformers would not load another one.

    Args:
        folder: the checkpoint folder.
        purpose: what the model would be used as, for the message.

    Raises:
        CheckpointError: its head is described.
    """
    description = read_description(folder)
    if description is not None and not isinstance(description.head, ClassifierHead):
        raise CheckpointError(
            f"{folder} has a head that {DESCRIPTION_FILE} describes and transformers would not load, so it cannot be "
            f"{purpose}: take a model with the classifier's own head."
        )


def resolve_pooling(description: RewardDescription | None, setting: Pooling | None) -> Pooling:
    """Return the pooling of a checkpoint: that of its description, else the setting, else ``hf``.

    Raises:
        SettingsError: the setting contradicts the description.
    """
    if description is None:
        return setting or "hf"
    if setting not in {None, description.pooling}:
        raise SettingsError(
            f"model.pooling is {setting}, but {DESCRIPTION_FILE} of the checkpoint says {description.pooling}, as in "
            "training: leave the setting out, or correct the file."
        )
    return description.pooling
