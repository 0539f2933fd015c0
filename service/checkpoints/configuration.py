"""Reads the configuration of a checkpoint folder as plain data, and builds transformers' configuration from it.

Entries that say how a trainer ran the model, not what it computes, are left out: implementations of attention and
experts that this environment need not have, and notations of dtypes that transformers does not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.checkpoints.bounds import check_configuration, check_file_size, check_nesting, too_deep
from service.checkpoints.files import CONFIG_FILE
from service.errors import CheckpointError

IMPLEMENTATION_KEYS = frozenset(
    f"{prefix}{part}_implementation{suffix}"
    for part in ("attn", "experts")
    for prefix, suffix in (("", ""), ("_", ""), ("_", "_internal"))
)
DTYPE_KEYS = ("dtype", "torch_dtype")
ROPE_KEYS = ("rope_scaling", "rope_parameters")


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, is larger or nested deeper than any, or holds something else.
    """
    check_file_size(file)
    try:
        content = json.loads(file.read_bytes())
    except RecursionError:
        raise too_deep(file) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: copy or save the checkpoint again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object: copy or save the checkpoint again.")
    check_nesting(file, content)
    return content


def read_config(folder: Path) -> Any:
    """Return transformers' configuration of a checkpoint folder; code from the folder is never run.

    Raises:
        CheckpointError: a value cannot be used; the message names it.
        Exception: whatever transformers raises for a configuration that it does not support.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    stored = read_json(folder / CONFIG_FILE)
    check_configuration(folder / CONFIG_FILE, stored)
    content = usable_entries(folder / CONFIG_FILE, stored)
    model_type = content.get("model_type")
    if content == stored or model_type not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return CONFIG_MAPPING[model_type].from_dict(content)


def usable_entries(file: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that say what the model computes, in transformers' notation.

    Args:
        file: the configuration, for messages.
        stored: its content.

    Raises:
        CheckpointError: a dtype does not exist, or the type of a rotary scaling is null.
    """
    content = {key: value for key, value in stored.items() if key not in IMPLEMENTATION_KEYS}
    content.pop("quantization_config", None)  # weights are widened before transformers gets them
    for key in DTYPE_KEYS:
        if isinstance(content.get(key), str):
            content[key] = _dtype_name(file, key, content[key])
    for key in ROPE_KEYS:
        rope = content.get(key)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) is None:
            raise CheckpointError(
                f"{file} has a {key} whose type is null, which names no scaling: set {key} to null if training had "
                "none, or write the type of training."
            )
    return {
        key: usable_entries(file, value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in content.items()
    }


def _dtype_name(file: Path, key: str, value: str) -> str | None:
    import torch

    name = value.removeprefix("torch.")
    if name == "auto":
        return None
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise CheckpointError(f"{file} has the {key} {name!r}, which torch does not have: write float32 or bfloat16.")
    return name
