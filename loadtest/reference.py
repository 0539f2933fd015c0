"""Computes reference rewards: plain transformers in fp32, one text at a time.

It runs after the measurement, because it would compete with it for the cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def reference_rewards(model: Path, items: Sequence[Mapping[str, str]]) -> list[float]:
    """Return the raw logit of each item, in order, as transformers' own classifier computes it in fp32."""
    import torch

    from loadtest.padded_server import Item, PaddedScorer

    scorer = PaddedScorer(model, torch.float32)
    return [scorer.score([Item.model_validate(item)])[0] for item in items]
