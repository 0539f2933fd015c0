"""Rotary embeddings whose frequencies depend on the longest sequence of a pass, and the resulting limit for batches.

Pure: it reads a configuration. Transformers picks such frequencies once a pass, so in a shared pass a long sequence
would change the rewards of the shorter ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from service.errors import SettingsError


def rope_length_limit(config: Any, max_tokens: int) -> int | None:
    """Return the length above which sequences have another set of rotary frequencies than up to it.

    It is the original maximum length of the LongRoPE scaling (``original_max_position_embeddings``).

    Args:
        config: the text configuration of a transformers model.
        max_tokens: the longest sequence that will be scored.

    Returns:
        The limit in tokens; None where all sequences up to ``max_tokens`` have the same frequencies.

    Raises:
        SettingsError: with ``dynamic`` scaling the frequencies grow with each longer sequence and are not reset, so
            rewards would depend on what was scored before.
    """
    limit = None
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        # Architectures without a limit on positions (ALiBi) have no rotary embeddings either.
        positions: int | None = getattr(config, "max_position_embeddings", None)
        original = rope.get("original_max_position_embeddings") or positions
        if original is None or max_tokens <= original:
            continue
        if kind == "dynamic":
            raise SettingsError(
                f"With dynamic rotary scaling rewards beyond {original} tokens depend on earlier sequences: "
                f"set model.max_input_tokens to {original} or less"
            )
        if kind == "longrope":
            limit = original
    return limit


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary parameters of the model, or of each of its layer types."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]
