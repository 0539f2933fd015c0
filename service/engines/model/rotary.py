"""Rotary embeddings that change with the longest sequence of a pass, and what follows for batches.

Pure: it reads a configuration. Transformers picks such frequencies once a pass, so in a shared pass a long sequence
would change the rewards of its short neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from service.errors import SettingsError


def length_border(config: Any, max_tokens: int) -> int | None:
    """Return up to how many tokens sequences share one set of frequencies, longer ones another; None: all share one.

    Args:
        config: the text configuration of a transformers model.
        max_tokens: the longest sequence that will be scored.

    Raises:
        SettingsError: the frequencies grow with each longer sequence and stay so (``dynamic``), so that rewards would
            depend on what was scored before.
    """
    border = None
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        original: int = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_tokens <= original:
            continue
        if kind == "dynamic":
            raise SettingsError(
                f"Dynamic rotary scaling lets rewards depend on earlier sequences beyond {original} tokens: "
                f"set model.max_input_tokens to {original} or less"
            )
        if kind == "longrope":
            border = original
    return border


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary parameters of the model, or of each of its layer types."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]
