"""Copies a pass's inputs to the device and its results to the host; the host waits for neither.

On CUDA all inputs are packed into one pinned buffer, which is copied once on a separate stream while the previous pass
still computes. Results are copied into pinned memory after their pass, and reading them waits for that copy alone. On a
CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from service.engines.base import Pending, Ready

ALIGNMENT = 16
"""Tensors of a buffer start at multiples of this many bytes; no element is longer."""


class Staging(Protocol):
    """Copies tensors to the device and back."""

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return CPU tensors on the device, for kernels that are launched from now on."""
        ...

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Start to copy the values that the kernels launched so far give these tensors.

        The pending result is on the CPU; requesting it raises ``RuntimeError`` if the device failed meanwhile.
        """
        ...


def staging_for(device: torch.device) -> Staging:
    """Return the staging of a device."""
    return PinnedStaging(device) if device.type == "cuda" else PlainStaging(device)


# --- One buffer for many tensors -------------------------------------------------------------------------------------


def buffer_offsets(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Return each tensor's offset in a buffer of all of them, and the length of the buffer, both in bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return offsets, end


def buffer_views(buffer: torch.Tensor, tensors: Sequence[torch.Tensor], offsets: Sequence[int]) -> list[torch.Tensor]:
    """Return views of a buffer, uint8 [bytes], with the shapes and dtypes of ``tensors``."""
    return [
        buffer[offset : offset + prod(tensor.shape) * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]


# --- Synchronous -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlainStaging:
    """Copies synchronously, and not at all where tensors are already in place, as on a CPU."""

    device: torch.device
    """Where the pass runs."""

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors on the device."""
        return [tensor.to(self.device) for tensor in tensors]

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Return the tensors on the CPU."""
        return Ready([tensor.cpu() for tensor in tensors])


# --- CUDA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PendingCopies:
    """Tensors in pinned memory, valid once the event has happened."""

    tensors: list[torch.Tensor]
    copied: torch.cuda.Event

    def result(self) -> list[torch.Tensor]:
        self.copied.synchronize()
        return self.tensors


class PinnedStaging:
    """Copies between pinned memory and a CUDA device, asynchronously to the kernels of the caller's stream.

    Pinned memory comes from torch's caching allocator, which reuses a block only when the copies from it are complete.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy the tensors as one buffer; kernels launched on the current stream from now on wait for it."""
        offsets, num_bytes = buffer_offsets(tensors)
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        for view, tensor in zip(buffer_views(pinned, tensors, offsets), tensors, strict=True):
            view.copy_(tensor)
        compute_stream = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copy_stream):
            buffer = pinned.to(self._device, non_blocking=True)
        compute_stream.wait_stream(self._copy_stream)
        # It was allocated on the copy stream, and must not be reused before the kernels of the other stream are done.
        buffer.record_stream(compute_stream)
        return buffer_views(buffer, tensors, offsets)

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Copy the tensors after the kernels launched so far; only ``result`` waits."""
        pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for target, tensor in zip(pinned, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        # A blocking event lets the waiting thread sleep, so that tokenization can use the core meanwhile.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._device))
        return _PendingCopies(pinned, copied)


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return one small tensor on the device, copied in order on its current stream and without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
