"""What several labels of a classifier mean: outputs with names, or classes of which one reward is made.

A classifier with several labels is one of two things. Labels of a regression are outputs that are served by name.
Classes are refused unless a description or a setting says how their logits become a reward, since a choice would be a
guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.checkpoints.described_heads import ClassifierHead
from service.checkpoints.files import CONFIG_FILE
from service.checkpoints.reward_description import (
    DESCRIPTION_FILE,
    Combination,
    LogProbability,
    Probability,
    RewardDescription,
    WeightedSum,
    validate_names,
)
from service.errors import SettingsError
from service.settings import ModelSettings

CLASS_REWARDS = ("logit", "logit_difference", "log_probability", "probability")
"""Functions of the logits of classes that ``model.class_reward`` may name."""


def resolve_description(
    folder: Path, stored: RewardDescription | None, config: Any, settings: ModelSettings
) -> RewardDescription | None:
    """Return the description by which a checkpoint is served: the stored one, or the one that its labels amount to.

    Args:
        folder: the checkpoint folder, for messages.
        stored: the content of ``reward_model.json``; None without the file.
        config: transformers' configuration.
        settings: its ``outputs``, ``class_reward`` and ``pooling`` are read.

    Raises:
        CheckpointError: two labels have one name.
        SettingsError: a setting contradicts the file or the configuration.
    """
    described = _described_labels(config, settings)
    if described is None:
        return stored
    if stored is not None:
        if settings.outputs is None and settings.class_reward is None:
            return stored
        raise SettingsError(
            f"model.outputs and model.class_reward are for checkpoints without {DESCRIPTION_FILE}, and this one has "
            "the file: leave the settings out, or correct the file."
        )
    validate_names(folder / CONFIG_FILE, described)
    return described


def _described_labels(config: Any, settings: ModelSettings) -> RewardDescription | None:
    """Return the description that the settings, or the configuration of a regression, amount to."""
    pooling, labels = settings.pooling or "hf", label_names(config)
    if settings.class_reward is not None:
        if settings.outputs is not None:
            raise SettingsError("model.outputs and model.class_reward exclude each other: leave one of them out.")
        combine = class_reward(settings.class_reward, labels)
        return RewardDescription(ClassifierHead(), outputs=labels, combine=combine, pooling=pooling)
    if settings.outputs is not None:
        if len(settings.outputs) != len(labels):
            raise SettingsError(
                f"model.outputs has {len(settings.outputs)} names, but the model has {len(labels)} labels: name each."
            )
        return RewardDescription(ClassifierHead(), outputs=settings.outputs, pooling=pooling)
    if len(labels) > 1 and getattr(config, "problem_type", None) == "regression":
        return RewardDescription(ClassifierHead(), outputs=labels, pooling=pooling)
    return None


def label_names(config: Any) -> tuple[str, ...]:
    """Return the names of the labels of a configuration, in the order of the logits."""
    return tuple(str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels))


def class_reward(text: str, labels: Sequence[str]) -> Combination:
    """Return the rule that a setting writes as ``FUNCTION:LABEL`` or ``logit_difference:LABEL,LABEL``.

    Args:
        text: the setting; a label is its name, or else its index.
        labels: names of the labels, in the order of the logits.

    Raises:
        SettingsError: there is no such function or label.
    """
    function, _, names = text.partition(":")
    if function not in CLASS_REWARDS:
        raise SettingsError(
            f"model.class_reward is {text}, which begins with none of {', '.join(CLASS_REWARDS)}: write the function, "
            "a colon and the label."
        )
    found = [_label_of(name.strip(), labels) for name in ([names] if names in labels else names.split(","))]
    needed = 2 if function == "logit_difference" else 1
    if len(found) != needed or len(set(found)) != needed:
        words = "two different labels" if needed > 1 else "one label"
        raise SettingsError(f"model.class_reward is {text}, but {function} needs {words}.")
    match function:
        case "logit":
            return WeightedSum({found[0]: 1.0})
        case "logit_difference":
            return WeightedSum({found[0]: 1.0, found[1]: -1.0})
        case "log_probability":
            return LogProbability(found[0])
        case _:
            return Probability(found[0])


def _label_of(name: str, labels: Sequence[str]) -> str:
    if name in labels:
        return name
    if name.isdecimal() and int(name) < len(labels):
        return labels[int(name)]
    raise SettingsError(f"model.class_reward names the label {name}, but the labels are {', '.join(labels)}.")


def labels_message(path: Path, config: Any, num_labels: int) -> str:
    """Return the refusal of a checkpoint with several labels whose meaning is not known."""
    names = label_names(config) if config.num_labels == num_labels else tuple(map(str, range(num_labels)))
    shown = ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")
    return (
        f"{path} gives {num_labels} numbers per text ({shown}), not one reward, and a choice among them would be a "
        f"guess: if they are classes, set model.class_reward, for example to log_probability:{names[-1]}; if they are "
        "outputs of a regression, set model.outputs to their names."
    )
