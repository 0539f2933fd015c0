"""Checks that a described head is stored, that its layers follow each other, and that its outputs are all named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from service.checkpoints.described_heads import (
    ClassifierHead,
    DescribedHead,
    EnsembleHead,
    GatedHead,
    LayeredHead,
    LinearLayer,
)
from service.checkpoints.reward_description import RewardDescription
from service.checkpoints.weights import TensorInfo
from service.errors import CheckpointError

Tensors = Mapping[str, TensorInfo]


def is_described(description: RewardDescription | None) -> bool:
    """Whether the head is described, instead of being the classifier's."""
    return description is not None and not isinstance(description.head, ClassifierHead)


def reads_labels(description: RewardDescription | None) -> bool:
    """Whether the head is the classifier's, with several labels whose meaning is described."""
    return description is not None and not is_described(description) and len(description.outputs) > 1


def validate_outputs(
    file: Path, description: RewardDescription, tensors: Tensors, hidden_size: int, num_labels: int
) -> None:
    """Check that a head is stored as described, and gives as many numbers as the description names.

    Args:
        file: the description, for messages.
        description: its content.
        tensors: the stored tensors.
        hidden_size: width of the last hidden state.
        num_labels: labels of the configuration, for the classifier's own head.

    Raises:
        CheckpointError: it does not.
    """
    head = description.head
    if not isinstance(head, ClassifierHead):
        width = validate_head(file, head, tensors, hidden_size)
    else:
        width = num_labels if reads_labels(description) else 1
    if width != len(description.outputs):
        raise CheckpointError(
            f"The head of {file} gives {width} {'number' if width == 1 else 'numbers'} per text, and the file names "
            f"{len(description.outputs)} outputs: name each one."
        )


def validate_head(file: Path, head: DescribedHead, tensors: Tensors, hidden_size: int) -> int:
    """Check that the tensors of a described head are stored and fit each other.

    Args:
        file: the description, for messages.
        head: the described head.
        tensors: the stored tensors.
        hidden_size: width of the last hidden state.

    Returns:
        How many numbers it gives.

    Raises:
        CheckpointError: they do not.
    """
    if isinstance(head, LayeredHead):
        if head.softcap is not None and not head.softcap > 0:
            raise CheckpointError(f"{file} has a softcap of {head.softcap}: it must be above zero.")
        return _validate_layers(file, head.layers, tensors, hidden_size)
    if isinstance(head, EnsembleHead):
        widths = [validate_head(file, member, tensors, hidden_size) for member in head.members]
        if len(widths) < 2 or set(widths) != {1}:
            raise CheckpointError(
                f"{file} describes an ensemble that is not of two or more heads with one number each."
            )
        return len(widths)
    return _validate_gated(file, head, tensors, hidden_size)


def _validate_gated(file: Path, head: GatedHead, tensors: Tensors, hidden_size: int) -> int:
    num_objectives = _validate_layers(file, [head.objectives], tensors, hidden_size)
    num_weights = _validate_layers(file, head.gate.layers, tensors, hidden_size)
    if num_weights != num_objectives:
        raise CheckpointError(f"The gate of {file} gives {num_weights} weights for {num_objectives} objectives.")
    if head.transform is not None:
        shape = _stored(file, head.transform, tensors).shape
        if shape != (num_objectives, num_objectives):
            raise CheckpointError(
                f"{head.transform} of {file} has the shape {list(shape)}, not [{num_objectives}, {num_objectives}]."
            )
    if not head.gate.temperature > 0:
        raise CheckpointError(
            f"The gate of {file} has a temperature of {head.gate.temperature}: it must be above zero."
        )
    return 1 + num_objectives


def _validate_layers(file: Path, layers: Sequence[LinearLayer], tensors: Tensors, width: int) -> int:
    """Check layers that read ``width`` numbers; return how many numbers the last one gives."""
    if not layers:
        raise CheckpointError(f"{file} describes a head without layers.")
    for layer in layers:
        stored = [_stored(file, name, tensors) for name in layer.tensor_names()]
        shape = stored[0].shape
        if len(shape) != 2 or shape[1] != width:
            raise CheckpointError(
                f"{layer.weight} of {file} has the shape {list(shape)}, but its input has {width} numbers."
            )
        width = shape[0]
        if len(stored) > 1 and stored[1].shape != (width,):
            raise CheckpointError(f"{layer.bias} of {file} has the shape {list(stored[1].shape)}, not [{width}].")
    if layers[-1].activation != "none":
        raise CheckpointError(f"The last layer of {file} has an activation; the service gives raw rewards: set none.")
    return width


def _stored(file: Path, name: str, tensors: Tensors) -> TensorInfo:
    if name not in tensors:
        raise CheckpointError(f"{file} names the tensor {name}, which the weight files do not hold.")
    return tensors[name]
