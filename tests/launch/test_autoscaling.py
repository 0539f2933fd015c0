"""The autoscaling policy: how many replicas the waiting work needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from service.autoscaling import BUSY, QUEUE_S, QueuedTokensPolicy


@dataclass
class FakeContext:
    """What Ray's controller passes."""

    current_num_replicas: int = 1
    target_num_replicas: int = 1
    aggregated_metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def context(queue_s: list[float], busy: list[float]) -> FakeContext:
    num = len(queue_s)
    return FakeContext(
        num, num, {QUEUE_S: dict(zip("abcdef", queue_s, strict=False)), BUSY: dict(zip("abcdef", busy, strict=False))}
    )


@pytest.mark.parametrize(
    ("queue_s", "busy", "desired"),
    [
        ([0.0], [0.0], 1),
        ([10.0], [1.0], 5),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 4),
        ([0.0, 0.0, 0.0], [0.2, 0.2, 0.2], 1),
        ([0.0, 0.0, 0.0], [0.8, 0.8, 0.8], 3),
        ([40.0, 0.0], [1.0, 0.0], 20),
    ],
)
def test_desired_replicas(queue_s: list[float], busy: list[float], desired: int) -> None:
    """Replicas follow the seconds of waiting work, and do not go below what keeps the engines busy."""
    assert QueuedTokensPolicy(target_queue_s=2.0, target_busy=0.8)(context(queue_s, busy)) == (desired, {})


def test_without_statistics_nothing_changes() -> None:
    """Before the first report of a replica the target stays."""
    assert QueuedTokensPolicy()(FakeContext(2, 3)) == (3, {})


@pytest.mark.parametrize("arguments", [{"target_queue_s": 0}, {"target_busy": 0}, {"target_busy": 1.5}])
def test_targets_are_checked(arguments: dict[str, float]) -> None:
    """A target that no number of replicas can meet is refused at once."""
    with pytest.raises(ValueError, match="target"):
        QueuedTokensPolicy(**arguments)
