"""Rotary frequencies that depend on a pass's longest sequence limit which sequences share a pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.engines.model.rotary import rope_length_limit
from service.errors import SettingsError


def config_with(rope_parameters: dict[str, Any] | None) -> SimpleNamespace:
    return SimpleNamespace(rope_parameters=rope_parameters, max_position_embeddings=8192)


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
DYNAMIC = {"rope_type": "dynamic", "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("parameters", "max_tokens", "limit"),
    [
        (None, 8192, None),
        ({"rope_type": "default", "rope_theta": 1e4}, 8192, None),
        ({"rope_type": "yarn", "original_max_position_embeddings": 2048}, 8192, None),
        (LONGROPE, 8192, 4096),
        (LONGROPE, 4096, None),
        ({"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}, 8192, 4096),
        (DYNAMIC, 2048, None),
    ],
)
def test_the_limit_is_where_frequencies_change(parameters: Any, max_tokens: int, limit: int | None) -> None:
    """Only scaling that changes within the served lengths gives a limit, also when it is configured per layer type."""
    assert rope_length_limit(config_with(parameters), max_tokens) == limit


def test_stateful_scaling_is_refused() -> None:
    """Frequencies that grow with each longer sequence keep state between calls; the error contains the limit."""
    with pytest.raises(SettingsError, match="max_input_tokens to 2048"):
        rope_length_limit(config_with(DYNAMIC), 4096)
