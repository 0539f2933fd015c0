"""Memory of this process and of the machine, as Linux counts it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_CGROUP = Path("/sys/fs/cgroup")


class HostMemory(Protocol):
    """Measures memory; all sizes in bytes."""

    def available(self) -> int:
        """Return how much more this process can take before the machine or its container runs out."""
        ...

    def growth(self, work: Callable[[], None]) -> int | None:
        """Run ``work`` and return by how much resident memory grew at its peak; None where that cannot be measured."""
        ...


class ProcessMemory:
    """Memory of this process, from /proc and from the limit of its control group (version 2)."""

    def available(self) -> int:
        """Return what the machine has left, or less where the container's limit is lower."""
        left = int(psutil.virtual_memory().available)
        try:
            limit = (_CGROUP / "memory.max").read_text().strip()
            used = int((_CGROUP / "memory.current").read_text())
        except (OSError, ValueError):
            return left
        return left if limit == "max" else max(min(left, int(limit) - used), 0)

    def growth(self, work: Callable[[], None]) -> int | None:
        """Run ``work`` once in any case; its exceptions are passed on.

        Free memory of the heap is given back first: what ``work`` takes from it would not be counted. Memory that other
        threads take meanwhile is counted too.
        """
        before = self._reset()
        work()
        if before is None:
            return None
        try:
            return max(_status_bytes("VmHWM") - before, 0)
        except OSError:
            return None

    def _reset(self) -> int | None:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # glibc only
            _CLEAR_REFS.write_text(_RESET_PEAK)
            return _status_bytes("VmRSS")
        except (OSError, AttributeError):
            return None


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024  # "12345 kB"
    raise OSError(f"{_STATUS} has no {key}")
