"""Fault schedules: what is broken during a load test, and when, declared as data.

Pure. A schedule is a YAML list such as::

    - {fault: kill_replica, at_s: 8, every_s: 8}
    - {fault: slow_clients, at_s: 5, connections: 500, for_s: 20}
    - {fault: rolling_update, at_s: 30}
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.errors import StartupError

FaultName = Literal[
    "kill_replica", "freeze_replica", "kill_proxy", "kill_controller", "kill_raylet", "rolling_update", "slow_clients"
]
NEEDS_OWN_SERVER = frozenset(
    {"kill_replica", "freeze_replica", "kill_proxy", "kill_controller", "kill_raylet", "rolling_update"}
)


class FaultScheduleError(StartupError):
    """A fault schedule cannot be read, or does not fit the server."""


class Fault(BaseModel):
    """One line of a schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fault: FaultName
    at_s: float = Field(ge=0, description="Seconds from the begin of the first phase.")
    every_s: float | None = Field(None, gt=0, description="Repeat after so many seconds; null: once.")
    connections: int = Field(100, ge=1, description="Of slow clients.")
    for_s: float = Field(10.0, gt=0, description="Seconds that slow clients stay, or a replica is frozen.")


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One occurrence of a fault."""

    at_s: float
    fault: Fault


def read_schedule(file: Path) -> list[Fault]:
    """Read a schedule.

    Raises:
        FaultScheduleError: the file cannot be read, or has a fault, a field or a value that does not exist.
    """
    try:
        return TypeAdapter(list[Fault]).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise FaultScheduleError(f"{file} cannot be read: {reason}.") from None
    except yaml.YAMLError:
        raise FaultScheduleError(f"{file} is no YAML.") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise FaultScheduleError(f"{file}: {place}: {first['msg']}.") from None


def occurrences(schedule: Sequence[Fault]) -> Iterator[PlannedFault]:
    """Yield every occurrence in order of time; without end where a fault repeats."""
    return heapq.merge(*(_repeated(fault) for fault in schedule), key=lambda planned: planned.at_s)


def _repeated(fault: Fault) -> Iterator[PlannedFault]:
    yield PlannedFault(fault.at_s, fault)
    if fault.every_s is not None:
        for number in itertools.count(1):
            yield PlannedFault(fault.at_s + number * fault.every_s, fault)


def check_fits(schedule: Sequence[Fault], *, owns_server: bool) -> None:
    """Check that all faults can be caused.

    Raises:
        FaultScheduleError: a fault ends processes of a server that the command has not started itself.
    """
    names = sorted({fault.fault for fault in schedule} & NEEDS_OWN_SERVER)
    if names and not owns_server:
        raise FaultScheduleError(f"{', '.join(names)}: only a server that --start has started is broken on purpose.")
