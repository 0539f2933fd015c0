"""``reward_model.json``: how a reward is computed from a checkpoint, where its class in transformers does not say it.

It stands beside the weights and describes the head, the pooling, and what is appended to a text. ``reward-convert`` and
``reward-train`` write it, and it may be written by hand. A checkpoint without the file is computed as transformers'
classifier does. This module reads and writes the file and opens no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from service.checkpoints.described_heads import (
    ClassifierHead,
    EnsembleHead,
    GatedHead,
    Head,
    LayeredHead,
    LinearLayer,
)
from service.errors import CheckpointError, SettingsError
from service.records import Pooling, StepAggregate

__all__ = ["ClassifierHead", "EnsembleHead", "GatedHead", "Head", "LayeredHead", "LinearLayer"]

DESCRIPTION_FILE = "reward_model.json"
FORMAT_VERSION = 1

LATER_FIELDS = frozenset({"combine", "steps"})
"""Optional fields that were added to the format; left out, they do not change the version of a model."""


class TextRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What training did to a text that neither the tokenizer nor the chat template does."""

    append_token_ids: tuple[int, ...] = ()
    """Token ids that stand after every text, such as a reward token whose state the head reads."""


class WeightedSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="weights"):
    """The sum of the outputs, each with a factor."""

    weights: dict[str, float]
    """Factors by the name of the output; an output without one does not count."""


class MeanOfOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="mean"):
    """The mean of the outputs, which are the members of an ensemble."""


class MinOfOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="min"):
    """The smallest output, of the most pessimistic member of an ensemble."""


class LowerBound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="lower_bound"):
    """The mean of the outputs minus a multiple of their standard deviation (with divisor n)."""

    num_std: float
    """The multiple."""


class Probability(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="probability"):
    """The probability of one output by the softmax over all; of a single output by the logistic function."""

    output: str
    """Name of the output."""


class LogProbability(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="log_probability"):
    """The natural logarithm of `Probability`."""

    output: str
    """Name of the output."""


Combination: TypeAlias = WeightedSum | MeanOfOutputs | MinOfOutputs | LowerBound | Probability | LogProbability
"""How the outputs at one token become one number."""


class StepRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a model that rewards steps is read."""

    marker: str | None = None
    """The text that training put after each step; the head is read at its last token."""

    marker_token_id: int | None = None
    """The token id of the marker, at which the head is read in given token ids; None: the marker is no single token."""

    aggregate: StepAggregate = "min"
    """How the rewards of the steps become the reward of a text."""

    separate: bool = False
    """Whether training tokenized each step alone and put the marker's token id after it. Otherwise the marker is a part
    of the text that is tokenized."""


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
    """Names of the numbers that the head gives at a token, in order."""

    pooling: Pooling = "hf"
    """The token whose hidden state the head reads."""

    text: TextRule = TextRule()

    combine: Combination | None = None
    """How the outputs become one reward. None: a single output is the reward; several have no reward without weights.
    """

    steps: StepRule | None = None
    """None: the model was trained to reward whole texts."""

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
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a valid description of a reward model ({error}).") from error
    validate_names(file, description)
    return description


def validate_names(file: Path, description: RewardDescription) -> None:
    """Check that the names of a description are different, and that its rule refers to them.

    Raises:
        CheckpointError: they are not, or it does not.
    """
    names = description.outputs
    if not names or len(set(names)) != len(names) or not all(names):
        raise CheckpointError(f"{file} has no names for its outputs, or one twice: name each output of the head once.")
    match description.combine:
        case WeightedSum(weights):
            unknown = sorted(set(weights) - set(names))
        case Probability(output) | LogProbability(output):
            unknown = [output] if output not in names else []
        case _:
            unknown = []
    if unknown:
        raise CheckpointError(f"combine in {file} refers to {unknown[0]!r}, which is not among its outputs.")


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
