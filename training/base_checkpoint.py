"""The checkpoint that training starts from: found, and checked by its small files before any heavy import.

A base that is refused here is refused in a fraction of a second. `training.reward_model` loads the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.checkpoints.adapter import is_adapter
from service.checkpoints.configuration import read_json
from service.checkpoints.demo_base import DEMO_BASE, obtain_demo_base
from service.checkpoints.files import CONFIG_FILE
from service.checkpoints.hub import local_folder
from service.checkpoints.quantization_format import refuse_quantized
from service.checkpoints.weights import read_tensor_infos, weight_files
from service.errors import CheckpointError, SettingsError
from training.recipe import Recipe

DEMO = "demo"
"""The value of ``--base`` that stands for the base of the demo model."""

HEAD_NAMES = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Names of the last layer of transformers' classifiers."""

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITION_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What ``config.json`` tells of a base; None for what it does not name."""

    num_layers: int | None
    max_positions: int | None


def locate_base(base: str) -> tuple[Path, str]:
    """Return the folder of a base and its name in the manifest, after downloading it where needed.

    Raises:
        CheckpointError: there is neither such a folder nor such a model on a reachable hub.
    """
    if base == DEMO:
        return obtain_demo_base(), DEMO_BASE
    return local_folder(base), base


def read_base_facts(folder: Path, num_outputs: int = 1) -> BaseFacts:
    """Check the small files of a base and return what its configuration tells.

    Args:
        folder: of the base.
        num_outputs: outputs of the head that will be trained.

    Raises:
        CheckpointError: the folder is an adapter, has no readable ``config.json``, or its weights are missing, damaged
            or end in a head with another number of outputs.
    """
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder} is a PEFT adapter, and training starts from a whole checkpoint: merge it with "
            "`reward-convert` first."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: pass the folder of a checkpoint.")
    refuse_quantized(folder, "a base for training")
    config = read_json(folder / CONFIG_FILE)
    for name, tensor in read_tensor_infos(weight_files(folder)).items():
        if name in HEAD_NAMES and tensor.shape[0] != num_outputs:
            raise CheckpointError(other_outputs(str(folder), name, tensor.shape[0], num_outputs))
    return BaseFacts(_first_count(config, _LAYER_KEYS), _first_count(config, _POSITION_KEYS))


def other_outputs(base: str, name: str, stored: int, wanted: int = 1) -> str:
    """Return the message for a base whose classification head has another number of outputs than is trained."""
    model = "a reward model has one" if wanted == 1 else f"--objectives names {wanted}"
    return (
        f"{base} is a classifier with {stored} output{'s' if stored != 1 else ''} ({name}), and {model}: "
        f"start from the language model that it was made of, or from a checkpoint with num_labels={wanted}."
    )


def check_against_base(recipe: Recipe, num_layers: int | None, max_positions: int | None) -> None:
    """Check the hyperparameters that depend on the base.

    Raises:
        SettingsError: more layers or positions than the base has; names the option.
    """
    if recipe.lora_layers is not None and num_layers is not None and recipe.lora_layers > num_layers:
        raise SettingsError(f"--lora-layers is {recipe.lora_layers}, but the base has {num_layers} layers.")
    if max_positions is not None and recipe.max_length > max_positions:
        raise SettingsError(
            f"--max-length is {recipe.max_length:,}, but the base has {max_positions:,} positions: "
            f"use at most --max-length {max_positions}."
        )


def _first_count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first of the entries that is a positive integer, in the text model's part of a configuration."""
    text = config.get("text_config")
    parts = (text, config) if isinstance(text, dict) else (config,)
    values = (part.get(key) for part in parts for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
