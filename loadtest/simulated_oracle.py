"""What the oracle of a simulation does beside its rewards: delays and faults, from plain arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from service.engines.oracle import OracleFaults


def simulated_faults(oracle: Mapping[str, Any]) -> OracleFaults:
    """Return the faults of an oracle.

    Args:
        oracle: ``seconds_per_token``, the duration of a pass; ``leaked_bytes``, which stay in use for each sequence;
            and ``control_bytes``, whether the control characters of `service.engines.oracle` trigger faults.
    """
    triggered = OracleFaults.by_control_bytes() if oracle.get("control_bytes") else OracleFaults()
    return replace(
        triggered,
        seconds_per_token=oracle.get("seconds_per_token", 0.0),
        leaked_bytes=oracle.get("leaked_bytes", 0),
    )
