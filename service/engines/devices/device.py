"""Where the forward pass runs and in which arithmetic: settings resolved against the machine at hand.

It loads no model. What "auto" became is shown by ``/v1/model``, so that what runs can be read.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from service.errors import SettingsError

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""The variable that lets torch ask the kernel for huge pages behind its larger CPU tensors. It is read once, at torch's
first allocation, so it is set here, where torch is first imported on the way to an engine, unless it was set before.
In a virtual machine a pass of a small model takes a fifth to a quarter less processor time with it."""

os.environ.setdefault(HUGE_PAGES, "1")


def resolve_device(choice: str) -> torch.device:
    """Return the device of the setting; ``auto`` takes CUDA when there is one.

    Raises:
        SettingsError: the name is no device, or this machine lacks it.
    """
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(choice)
    except RuntimeError:
        raise SettingsError(f"model.device is {choice}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in {"cpu", "cuda"}:
        raise SettingsError(f"model.device is {choice}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"model.device is {choice}, but this process sees {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(choice: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the arithmetic of the body.

    Args:
        choice: the setting: ``auto`` or the name of a torch dtype.
        stored: in which dtype the checkpoint was saved.
        device: where the forward pass runs; ``auto`` keeps the stored dtype on CUDA and asks a CPU for its units.
    """
    if choice != "auto":
        dtype: torch.dtype = getattr(torch, choice)
        return dtype
    if device.type == "cuda":
        return stored
    return torch.bfloat16 if has_native_bfloat16() else torch.float32


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AMX, AVX-512 BF16); without, bfloat16 is slower than float32."""
    return has_amx() or has_avx512_bf16()


def has_avx512_bf16() -> bool:
    """Whether this CPU has AVX-512 with bfloat16."""
    return bool(_capabilities().get("avx512_bf16"))


def has_avx512() -> bool:
    """Whether this CPU has the parts of AVX-512 that all servers with it have."""
    return all(_capabilities().get(f"avx512_{part}") for part in ("f", "bw", "vl", "dq"))


def has_avx512_vnni() -> bool:
    """Whether this CPU multiplies int8 in vectors (AVX-512 VNNI)."""
    return bool(_capabilities().get("avx512_vnni"))


def multiplies_int8_exactly() -> bool:
    """Whether sums of uint8 x int8 products do not saturate: with VNNI, and on CPUs that are not x86-64.

    Without VNNI (AVX2, first AVX-512) an instruction adds two products into 16 bits, which overflow.
    """
    return not _is_x86_64() or has_avx512_vnni() or bool(_capabilities().get("avx_vnni"))


def _is_x86_64() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def is_intel() -> bool:
    """Whether Intel made this CPU."""
    described = Path("/proc/cpuinfo")
    return described.is_file() and "GenuineIntel" in described.read_text()


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX)."""
    return bool(_capabilities().get("amx_bf16"))


@cache
def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities()


def resolve_threads(choice: int | None) -> int:
    """Return the CPU threads of the forward pass: the setting, else as many as this process may run on.

    Ray starts its workers with ``OMP_NUM_THREADS=1``, so torch's own default would leave a replica on one core.
    """
    if choice is not None:
        return choice
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Parameters of glibc's ``mallopt``, as ``malloc.h`` numbers them."""


def keep_freed_memory() -> None:
    """Let this process keep what a CPU forward pass frees, for the next pass to take.

    A pass allocates and frees the same tens of megabytes each time. By default glibc gives them back to the kernel,
    which clears every page anew: a tenth to a third of the time of a small model (measured on two cores). One arena,
    because the others cannot grow beyond 64 MiB in one piece. Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_ARENA_MAX, 1)
    libc.mallopt(_MMAP_THRESHOLD, 32 * 1024 * 1024)  # the most that it takes
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 64 * 1024 * 1024)


def release_memory(device: torch.device) -> None:
    """Give freed memory back to the device, so that a smaller batch finds room in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_lost(device: torch.device) -> bool:
    """Whether a CUDA device fails at everything since a kernel on it failed: a new process is what helps."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device had no room; torch has no class of its own for the CPU's allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "not enough memory", "_STATUS_ALLOC_FAILED")
    )
