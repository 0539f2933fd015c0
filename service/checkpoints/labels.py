"""What several labels of a classifier mean: outputs with names, or classes of which one reward is made.

A classifier with several labels is one of two things. Labels of a regression are outputs that are served by name. Classes
are refused unless the description or a setting says how their logits become a reward, since a choice would be a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from service.checkpoints.described_heads import ClassifierHead, Readout, ReadoutFunction
from service.checkpoints.reward_description import DESCRIPTION_FILE, RewardDescription
from service.errors import CheckpointError, SettingsError
from service.settings import ModelSettings

FUNCTIONS: tuple[ReadoutFunction, ...] = get_args(ReadoutFunction)


def resolve_description(
    stored: RewardDescription | None, config: Any, settings: ModelSettings
) -> RewardDescription | None:
    """Return the description by which a checkpoint is served: the stored one, or the one that its labels amount to.

    Args:
        stored: the content of ``reward_model.json``; None without the file.
        config: transformers' configuration.
        settings: its ``outputs``, ``class_reward`` and ``pooling`` are read.

    Raises:
        SettingsError: a setting contradicts the file or the configuration.
    """
    named = settings.outputs is not None or settings.class_reward is not None
    if stored is not None:
        if named:
            raise SettingsError(
                f"model.outputs and model.class_reward are for checkpoints without {DESCRIPTION_FILE}, and this one "
                "has the file: leave the settings out, or correct the file."
            )
        return stored
    pooling = settings.pooling or "hf"
    if settings.class_reward is not None:
        if settings.outputs is not None:
            raise SettingsError("model.outputs and model.class_reward exclude each other: leave one of them out.")
        readout = parse_readout(settings.class_reward, label_names(config))
        return RewardDescription(ClassifierHead(), readout=readout, pooling=pooling)
    if settings.outputs is not None:
        _refuse_other_number(settings.outputs, config)
        return RewardDescription(ClassifierHead(), outputs=tuple(settings.outputs), pooling=pooling)
    if config.num_labels > 1 and getattr(config, "problem_type", None) == "regression":
        return RewardDescription(ClassifierHead(), outputs=label_names(config), pooling=pooling)
    return None


def label_names(config: Any) -> tuple[str, ...]:
    """Return the names of the labels of a configuration, in the order of the logits."""
    return tuple(str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels))


def parse_readout(text: str, labels: Sequence[str]) -> Readout:
    """Return the readout that a setting writes as ``FUNCTION:LABEL`` or ``logit_difference:LABEL,LABEL``.

    Args:
        text: the setting; a label is its name, or else its index.
        labels: names of the labels, in the order of the logits.

    Raises:
        SettingsError: there is no such function or label.
    """
    function, _, names = text.partition(":")
    if function not in FUNCTIONS:
        raise SettingsError(
            f"model.class_reward is {text}, which begins with none of {', '.join(FUNCTIONS)}: write the function, a "
            "colon and the label."
        )
    indices = [_index_of(name.strip(), labels) for name in _split(names, labels)]
    if len(indices) != (2 if function == "logit_difference" else 1) or len(set(indices)) != len(indices):
        needed = "two different labels" if function == "logit_difference" else "one label"
        raise SettingsError(f"model.class_reward is {text}, but {function} needs {needed}.")
    against = indices[1] if function == "logit_difference" else None
    return Readout(function, indices[0], against, tuple(labels))


def _split(names: str, labels: Sequence[str]) -> list[str]:
    return [names] if names in labels else names.split(",")


def _index_of(name: str, labels: Sequence[str]) -> int:
    if name in labels:
        return labels.index(name)
    if name.isdecimal() and int(name) < len(labels):
        return int(name)
    raise SettingsError(f"model.class_reward names the label {name}, but the labels are {', '.join(labels)}.")


def _refuse_other_number(outputs: Sequence[str], config: Any) -> None:
    if len(outputs) != config.num_labels:
        raise SettingsError(
            f"model.outputs has {len(outputs)} names, but the model has {config.num_labels} labels: name each label."
        )
    if len(set(outputs)) != len(outputs):
        raise SettingsError("model.outputs has a name twice: give each label a name of its own.")


def labels_message(path: Any, config: Any, num_labels: int) -> str:
    """Return the refusal of a checkpoint with several labels whose meaning is not known."""
    names = label_names(config) if config.num_labels == num_labels else tuple(map(str, range(num_labels)))
    shown = ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")
    classes = (
        f"{path} has {num_labels} labels ({shown}), not one reward, and a choice among them would be a guess: if they "
        f"are classes, set model.class_reward to logit:{names[-1]}, log_probability:{names[-1]} or "
        f"logit_difference:{names[-1]},{names[0]}; "
    )
    return f"{classes}if they are outputs of a regression, set model.outputs to their names."


def validate_readout(file: Any, readout: Readout, num_logits: int) -> None:
    """Check that a readout names logits that there are.

    Raises:
        CheckpointError: it does not.
    """
    needs_other = readout.function == "logit_difference"
    indices = [readout.label, *([] if readout.against is None else [readout.against])]
    if needs_other != (readout.against is not None) or len(set(indices)) != len(indices):
        raise CheckpointError(
            f"{file} has a readout with the function {readout.function}: logit_difference needs label and another "
            "against, the other functions label alone."
        )
    if not all(0 <= index < num_logits for index in indices):
        raise CheckpointError(f"{file} has a readout of logit {max(indices)}, but the head gives {num_logits} logits.")
