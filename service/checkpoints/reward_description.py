"""``reward_model.json``: how a reward is computed from a checkpoint, where its class in transformers does not say it.

It stands beside the weights and describes the head, the pooling, and what is appended to a text. ``reward-convert`` and
``reward-train`` write it, and it may be written by hand. A checkpoint without the file is computed as transformers'
classifier does. This module reads and writes the file and opens no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from service.errors import CheckpointError, SettingsError
from service.records import Activation, Pooling

DESCRIPTION_FILE = "reward_model.json"
FORMAT_VERSION = 1


class LinearLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear layer of a head, and the activation after it."""

    weight: str
    """Name of the stored tensor, of shape [outputs, inputs]."""

    bias: str | None = None
    """Name of the stored tensor, of shape [outputs]; None: the layer has no bias."""

    activation: Activation = "none"


class ClassifierHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="classifier"):
    """The head of transformers' classifier of the architecture."""


class LayeredHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="layers"):
    """Linear layers with activations between them, on the state of the pooled token."""

    layers: tuple[LinearLayer, ...]
    """First to last; the last one gives the outputs."""

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of all its stored tensors, in the order of the layers."""
        return tuple(name for layer in self.layers for name in (layer.weight, layer.bias) if name is not None)


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

    head: ClassifierHead | LayeredHead
    format_version: int = FORMAT_VERSION

    outputs: tuple[str, ...] = ("reward",)
    """Names of the numbers that the head gives."""

    pooling: Pooling = "hf"
    """The token whose hidden state the head reads."""

    text: TextRule = TextRule()
    source: Provenance | None = None

    def reward_facts(self) -> dict[str, Any]:
        """Return what changes a reward, as JSON-ready values; empty where it is what holds without the file."""
        facts: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(self, source=None))
        default: dict[str, Any] = msgspec.to_builtins(RewardDescription(ClassifierHead()))
        return {} if facts == default else facts

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        return content


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
    if len(description.outputs) != 1:
        raise CheckpointError(f"{file} names {len(description.outputs)} outputs, but one reward is served: name one.")
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
