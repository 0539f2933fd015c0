"""Measures the share of time in which a GPU is busy: the union of the time spans of its kernels and copies.

The profiler slows the host down, so the share is a lower bound where kernel launches limit the speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

Span = tuple[float, float]
"""Begin and end, in the same unit of time."""


def busy_share(run: Callable[[], object]) -> float:
    """Call ``run`` under torch's profiler and return the share of its wall time in which the device was busy."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    return covered(spans) / 1e6 / seconds  # the profiler counts in microseconds


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
