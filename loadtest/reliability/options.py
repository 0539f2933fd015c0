"""The options of the experiments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loadtest.simulated_server import Runtime


@dataclass(frozen=True, slots=True)
class ExperimentOptions:
    """What a run is to do; the shortened experiments of docs/reliability.md use smaller numbers."""

    items: int = 100_000
    """Through the client, in the experiments that keep a ledger."""

    duration_s: float = 10.0
    """Of each phase of load."""

    kill_every_s: float = 8.0
    runtime: Runtime = "ray"
    """Of the experiments with one replica, but for those that start the service itself."""

    tokens_per_s: float = 20_000.0
    """Of a replica's simulated forward pass."""

    seed: int = 1
    model: Path | None = None
    """Checkpoint of the experiments with a real model; None: a random one of 24M parameters."""
