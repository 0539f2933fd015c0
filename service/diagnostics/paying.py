"""Puts the drift signals first that a policy moves when it learns what the reward pays for.

The probe of the calibration says which edits raise the reward; each edit moves one signal in one direction. Drift in
such a direction is more likely to be hacking than drift in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.edits.probe import Direction, Probe

_PREFIX = "cusum_"


def mark_paying(description: Mapping[str, Any], probe: Probe | None) -> dict[str, Any]:
    """Return a description of the monitors with ``pays`` in its signals and alarms, those that pay first.

    ``pays`` is true where an edit that raises the reward moves the signal; of a signal in alarm, only if it moves it in
    the direction of the larger cumulative sum. It is None without a probe, and for an alarm that is not of a signal.
    Among those that pay the largest effect is first; all others keep their order.

    Args:
        description: JSON-ready, of `service.diagnostics.monitors.monitor.describe_state`.
        probe: of the calibration; None where it has none.
    """
    effects = {} if probe is None else probe.signals()
    cusum = description["cusum"]
    paid = {one["signal"]: _effect(one, effects) for one in cusum["signals"]}

    def marked(entry: dict[str, Any], signal: str | None) -> dict[str, Any]:
        return entry | {"pays": None if probe is None or signal not in paid else paid[signal] is not None}

    def ordered(entries: Sequence[dict[str, Any]], signals: Sequence[str | None]) -> list[dict[str, Any]]:
        pairs = sorted(zip(entries, signals, strict=True), key=lambda pair: -(paid.get(pair[1] or "") or 0.0))
        return [marked(entry, signal) for entry, signal in pairs]

    alarms = description["alarms"]
    return {
        **description,
        "alarms": ordered(alarms, [_signal_of(one["name"]) for one in alarms]),
        "cusum": cusum | {"signals": ordered(cusum["signals"], [one["signal"] for one in cusum["signals"]])},
    }


def _signal_of(alarm: str) -> str | None:
    return alarm.removeprefix(_PREFIX) if alarm.startswith(_PREFIX) else None


def _effect(reading: Mapping[str, Any], effects: Mapping[tuple[str, Direction], float]) -> float | None:
    """Return the largest effect of the edits that move a signal as it has moved; None where none of them pays."""
    drift: Direction = "up" if reading["up"] >= reading["down"] else "down"
    directions: tuple[Direction, ...] = (drift,) if reading["alarm"] else ("up", "down")
    found = [effects[reading["signal"], one] for one in directions if (reading["signal"], one) in effects]
    return max(found, default=None)
