"""What the start command sends to the process that runs Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """One line of JSON on the standard input of the process that runs Ray."""

    settings: dict[str, Any]
    """The settings tree of a replica."""
    folder: str
    """Private folder of the server."""
    host: str
    """Address on which HTTP listens."""
    port: int
    """TCP port of HTTP."""
    replicas: int
    """Number of copies of the model."""
    cpus: int
    """CPU cores of one replica."""
    gpus: int
    """GPUs of one replica."""
    drain_s: float
    """Seconds that accepted requests get once shutdown has begun."""
