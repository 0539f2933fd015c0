"""How a pass's inputs reach the device and its results come back, without the host waiting for either.

On CUDA all inputs lie in one pinned buffer and are copied once, on a stream of their own, while the pass before still
computes. Results are copied into pinned memory behind their pass, and whoever reads them waits for that copy alone. On
a CPU everything is where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from service.engines.base import Pending, Ready

ALIGNMENT = 16
"""Bytes on whose multiples the tensors of a buffer begin; no element is longer."""


class Staging(Protocol):
    """Brings tensors to the device and back."""

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors of the CPU on the device, for kernels that are launched from now on."""
        ...

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Begin to copy what the kernels launched so far make of these tensors."""
        ...


def staging_for(device: torch.device) -> Staging:
    """Return the way to and from a device."""
    return PinnedStaging(device) if device.type == "cuda" else PlainStaging(device)


# --- One buffer for many tensors -------------------------------------------------------------------------------------


def lay_out(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Return the byte at which each tensor begins in a buffer of all of them, and the buffer's length."""
    begins, end = [], 0
    for tensor in tensors:
        begins.append(end)
        end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return begins, end


def views_of(buffer: torch.Tensor, tensors: Sequence[torch.Tensor], begins: Sequence[int]) -> list[torch.Tensor]:
    """Return the pieces of a buffer, uint8 [bytes], as tensors of the shapes and types of ``tensors``."""
    return [
        buffer[begin : begin + prod(tensor.shape) * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for tensor, begin in zip(tensors, begins, strict=True)
    ]


# --- Without a way to go ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlainStaging:
    """Computes in order: what is sent is there, and what is fetched is done."""

    device: torch.device

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors on the device."""
        return [tensor.to(self.device) for tensor in tensors]

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Return the tensors as they are."""
        return Ready([tensor.cpu() for tensor in tensors])


# --- CUDA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PinnedCopies:
    tensors: list[torch.Tensor]
    copied: torch.cuda.Event

    def result(self) -> list[torch.Tensor]:
        self.copied.synchronize()
        return self.tensors


class PinnedStaging:
    """Copies between pinned memory and a CUDA device, beside and behind the kernels of the caller's stream.

    Pinned memory comes from torch's own cache, which hands a piece out again only when the copies from it are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy the tensors in one piece; kernels of the current stream that are launched from now on wait for it."""
        begins, num_bytes = lay_out(tensors)
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        for place, tensor in zip(views_of(pinned, tensors, begins), tensors, strict=True):
            place.copy_(tensor)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            buffer = pinned.to(self._device, non_blocking=True)
        computing.wait_stream(self._copies)
        # It was allocated on the stream of the copies, and must outlive the kernels that read it on the other one.
        buffer.record_stream(computing)
        return views_of(buffer, tensors, begins)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Copy the tensors behind the kernels launched so far; nobody waits before ``result``."""
        pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for place, tensor in zip(pinned, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        # A blocking event lets the thread sleep, so that tokenization has the core meanwhile.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._device))
        return _PinnedCopies(pinned, copied)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return one small tensor on the device, in the order of its current stream and without waiting for that."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
