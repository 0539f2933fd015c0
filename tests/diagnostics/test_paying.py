"""Signals that a policy moves when it learns what pays come first, in the direction that pays."""

from __future__ import annotations

from typing import Any

from service.diagnostics.paying import mark_paying
from service.edits.probe import Direction, EditEffect, Probe


def effect(signal: str, low: float, direction: Direction = "up") -> EditEffect:
    return EditEffect("edit", 1, "text", signal, direction, 9, 9, low + 1, low, low + 2, low + 1, low, low + 2, 1.0)


def described(**sums: tuple[float, float, bool]) -> dict[str, Any]:
    signals = [{"signal": name, "up": up, "down": down, "alarm": on} for name, (up, down, on) in sums.items()]
    drifting = [{"name": f"cusum_{one['signal']}"} for one in signals if one["alarm"]]
    return {"alarms": [{"name": "reward_length_corr"}, *drifting], "cusum": {"threshold": 8, "signals": signals}}


PROBE = Probe(
    9, 1.0, 0, [effect("hedges", 0.1), effect("markdown", 0.4), effect("emoji", -1), effect("log_tokens", 0.2)]
)
STREAM = described(
    surprise=(9, 0, True), emoji=(9, 0, True), hedges=(9, 0, True), log_tokens=(0, 9, True), markdown=(0, 1, False)
)


def test_what_pays_is_first() -> None:
    """Signals and alarms that pay come before the others, by the size of the effect; the others keep their order."""
    found = mark_paying(STREAM, PROBE)

    assert [(one["signal"], one["pays"]) for one in found["cusum"]["signals"]] == [
        ("markdown", True), ("hedges", True), ("surprise", False), ("emoji", False), ("log_tokens", False)
    ]  # fmt: skip
    assert [(one["name"], one["pays"]) for one in found["alarms"]] == [
        ("cusum_hedges", True), ("reward_length_corr", None), ("cusum_surprise", False), ("cusum_emoji", False),
        ("cusum_log_tokens", False),
    ]  # fmt: skip


def test_the_direction_counts() -> None:
    """Shorter answers are no hacking where length pays; they are where cutting pays."""
    cut = Probe(9, 1.0, 0, [effect("log_tokens", 0.2, "down")])

    assert mark_paying(STREAM, cut)["alarms"][0] == {"name": "cusum_log_tokens", "pays": True}


def test_without_a_probe_it_is_unknown() -> None:
    """Null, and the order of before."""
    found = mark_paying(STREAM, None)

    assert [one["name"] for one in found["alarms"]] == [one["name"] for one in STREAM["alarms"]]
    assert {one["pays"] for one in (*found["alarms"], *found["cusum"]["signals"])} == {None}
