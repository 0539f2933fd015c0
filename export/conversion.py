"""What a conversion changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion changed; written into the result as ``conversion.json``."""

    source: str
    """The folder that was converted."""

    origin: str
    """The layout that was recognised, or the library that wrote it."""

    head: tuple[str, ...]
    """The tensors that became the head; empty where the head had the classifier's name already."""

    dropped_bias: float
    """The constant by which served rewards are lower than those of training."""

    notes: tuple[str, ...]
    """Sentences on differences between training and serving."""
