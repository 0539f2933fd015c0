"""Device and dtype of the forward pass, resolved from the settings and this machine; its memory allocators.

It loads no model and changes nothing at import. ``/v1/model`` shows what "auto" was resolved to.
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

THP_VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""The environment variable that lets torch request transparent huge pages for its larger CPU tensors."""


def enable_huge_pages() -> None:
    """Let torch request huge pages for its larger CPU tensors, unless the variable is already set.

    Torch reads the variable once, at its first allocation of a CPU tensor in the process, so this is called before a
    checkpoint is opened. In a virtual machine a pass of a small model takes a fifth to a quarter less processor time.
    """
    os.environ.setdefault(THP_VARIABLE, "1")


def resolve_device(choice: str) -> torch.device:
    """Return the device of the setting; ``auto`` is CUDA where a CUDA device exists.

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


def resolve_dtype(choice: str, stored: torch.dtype, device: torch.device, *, native_bfloat16: bool) -> torch.dtype:
    """Return the dtype of the model's body.

    Args:
        choice: the setting: ``auto`` or the name of a torch dtype.
        stored: the dtype in which the checkpoint was saved.
        device: the device of the forward pass; ``auto`` is the stored dtype on CUDA.
        native_bfloat16: whether the CPU multiplies bfloat16 natively; ``auto`` is then bfloat16, else float32.
    """
    if choice != "auto":
        dtype: torch.dtype = getattr(torch, choice)
        return dtype
    if device.type == "cuda":
        return stored
    return torch.bfloat16 if native_bfloat16 else torch.float32


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AMX, AVX-512 BF16); without, bfloat16 is slower than float32."""
    return has_amx() or has_avx512_bf16()


def has_avx2() -> bool:
    """Whether this CPU has AVX2 and FMA."""
    return _torch_uses_avx2() and all(_capabilities().get(name) for name in ("avx2", "fma3"))


def has_avx512_bf16() -> bool:
    """Whether this CPU has AVX-512 with bfloat16."""
    return _torch_uses_avx512() and bool(_capabilities().get("avx512_bf16"))


def has_avx512() -> bool:
    """Whether this CPU has the AVX-512 extensions F, BW, VL and DQ, as all server CPUs with AVX-512 do."""
    return _torch_uses_avx512() and all(_capabilities().get(f"avx512_{part}") for part in ("f", "bw", "vl", "dq"))


def has_avx512_vnni() -> bool:
    """Whether this CPU has int8 dot products in AVX-512 (VNNI)."""
    return _torch_uses_avx512() and bool(_capabilities().get("avx512_vnni"))


def multiplies_int8_exactly() -> bool:
    """Whether sums of uint8 x int8 products do not saturate: with VNNI, and on CPUs that are not x86-64.

    Without VNNI (AVX2, first AVX-512) an instruction adds two products into 16 bits, which overflow.
    """
    return not _is_x86_64() or has_avx512_vnni() or bool(_capabilities().get("avx_vnni"))


def _is_x86_64() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def is_intel() -> bool:
    """Whether this is an Intel CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text()


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrix tiles (AMX)."""
    return _torch_uses_avx512() and bool(_capabilities().get("amx_bf16"))


def _torch_uses_avx512() -> bool:
    """Whether torch uses AVX-512: ``ATEN_CPU_CAPABILITY`` limits our kernels to what it limits torch's own to."""
    return _torch_uses_avx2() and torch.backends.cpu.get_cpu_capability() != "AVX2"


def _torch_uses_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() not in {"DEFAULT", "NO AVX"}


@cache
def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities()


def resolve_threads(choice: int | None) -> int:
    """Return the CPU threads of the forward pass: the setting, else as many as this process may run on.

    Ray starts its workers with ``OMP_NUM_THREADS=1``, so torch's own default would run a replica on one core.
    """
    if choice is not None:
        return choice
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Parameters of glibc's ``mallopt``, as ``malloc.h`` numbers them."""


def retain_freed_memory() -> None:
    """Let glibc retain what a CPU forward pass frees, so that the next pass reuses it.

    Every pass allocates and frees the same tens of megabytes. By default glibc returns them to the operating system,
    which clears every page on the next use: a tenth to a third of the time of a small model (measured on two cores).
    One arena, because the others cannot grow beyond 64 MiB of contiguous memory. Without glibc this has no effect.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_ARENA_MAX, 1)
    libc.mallopt(_MMAP_THRESHOLD, 32 * 1024 * 1024)  # the largest value that glibc accepts
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 64 * 1024 * 1024)


def forbid_reduced_reductions() -> None:
    """Let CUDA's matrix products in half precision add up partial results in float32 only; for the whole process."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def release_memory(device: torch.device) -> None:
    """Return cached memory to the device, so that the contiguous tensors of a smaller batch can be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_device_lost(device: torch.device) -> bool:
    """Whether a CUDA device fails at every call after a failed kernel, so that only a new process can use it."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that the device is out of memory; torch has no class for errors of the CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "not enough memory", "_STATUS_ALLOC_FAILED")
    )
