"""The processes of a run: one, or as many as a launcher such as ``accelerate launch`` started.

Launchers tell each process its number in environment variables. All processes compute the same; the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Processes:
    """The number of this process and how many there are."""

    rank: int = 0
    """Among all processes; process 0 writes files and prints."""

    local_rank: int = 0
    """Among the processes of this machine; process 0 prints errors, because files may differ between machines."""

    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0


def read_processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """Return what the launcher set (torchrun's variables, which accelerate sets too); one process without a launcher.

    Raises:
        SettingsError: a variable is not a number.
    """
    try:
        return Processes(
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            count=int(environment.get("WORLD_SIZE", "1")),
        )
    except ValueError:
        raise SettingsError("RANK, LOCAL_RANK and WORLD_SIZE must be numbers; launchers set them.") from None
