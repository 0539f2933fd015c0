"""Whether a base that the user gives for an adapter is the one that the adapter was trained on.

An adapter of one architecture may fit the shapes of another, and the merged model then gives rewards that mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_client.provenance import base_hash, read_origin

from service.checkpoints.configuration import read_json
from service.checkpoints.files import ADAPTER_CONFIG_FILE, CONFIG_FILE
from service.errors import CheckpointError

COMPARED_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""Entries of ``config.json`` in which two copies of one base cannot differ."""


def check_base(adapter: Path, base: Path) -> str | None:
    """Compare a given base with the one that the adapter's configuration names.

    Args:
        adapter: the adapter's folder.
        base: the folder that the user gives as its base.

    Returns:
        A sentence for the user where the two could not be compared; None where they agree.

    Raises:
        CheckpointError: ``adapter`` is no adapter, or the bases differ in architecture or size.
    """
    if not (adapter / ADAPTER_CONFIG_FILE).is_file():
        raise CheckpointError(f"{adapter} is no PEFT adapter, so it has no base model: leave --base out.")
    name = _read(adapter / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    origin = read_origin(adapter)
    if origin is not None and origin.base_hash is not None and origin.base_hash == base_hash(base):
        return None
    if not isinstance(name, str) or not name:
        return f"The adapter names no base model; it was merged into {base}, which could not be compared."
    file = _config_file(name)
    if file is None:
        return (
            f"The adapter names {name} as its base model, which is not on this machine; it was merged into {base}, "
            "and the two could not be compared."
        )
    named, given = _read(file), _read(base / CONFIG_FILE)
    for key in COMPARED_KEYS:
        if key in named and key in given and named[key] != given[key]:
            raise CheckpointError(
                f"The adapter was trained on {name}, whose {key} is {named[key]}, but that of {base} is {given[key]}: "
                "give the base that it was trained on."
            )
    return None


def _config_file(name: str) -> Path | None:
    """Return the base's ``config.json`` where it is on this machine: in its folder, or in the hub's cache."""
    file = Path(name).expanduser() / CONFIG_FILE
    if file.is_file():
        return file
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, CONFIG_FILE)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _read(file: Path) -> Mapping[str, Any]:
    values = read_json(file)
    text = values.get("text_config")
    return values | text if isinstance(text, dict) else values
