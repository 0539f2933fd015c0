"""Device, dtype and threads are resolved from settings and machine, and what a machine lacks is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from service.engines.devices import device
from service.engines.devices.device import (
    THP_VARIABLE,
    has_amx,
    has_avx2,
    has_avx512,
    has_native_bfloat16,
    is_out_of_memory,
    resolve_device,
    resolve_dtype,
    resolve_threads,
)
from service.errors import SettingsError


@pytest.mark.parametrize("choice", ["gpu", "cuda:99", "mps", "meta"])
def test_a_missing_device_is_refused(choice: str) -> None:
    """A name that is no device, or a device this machine lacks, fails the start; the error names the setting."""
    with pytest.raises(SettingsError, match=r"model\.device"):
        resolve_device(choice)


def test_auto_takes_cuda_when_there_is_one(monkeypatch) -> None:
    """``auto`` is CUDA where torch sees it and the CPU elsewhere; ``cpu`` is always the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize(("has_units", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_on_a_cpu_follows_its_bfloat16_units(has_units: bool, expected: torch.dtype) -> None:
    """A CPU with bfloat16 units computes in bfloat16, another in float32, whatever the checkpoint was saved in."""
    assert resolve_dtype("auto", torch.float16, torch.device("cpu"), native_bfloat16=has_units) == expected


def test_dtype_on_cuda_and_by_choice() -> None:
    """``auto`` on CUDA is the checkpoint's own dtype; a requested dtype is used on any device."""
    assert resolve_dtype("auto", torch.float16, torch.device("cuda"), native_bfloat16=True) == torch.float16
    assert resolve_dtype("float32", torch.bfloat16, torch.device("cuda"), native_bfloat16=True) == torch.float32
    assert resolve_dtype("bfloat16", torch.float32, torch.device("cpu"), native_bfloat16=False) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "avx2", "avx512"),
    [("AVX512", True, True), ("AVX2", True, False), ("DEFAULT", False, False)],
)
def test_torch_s_own_limit_of_instruction_sets_is_respected(
    monkeypatch: pytest.MonkeyPatch, capability: str, avx2: bool, avx512: bool
) -> None:
    """What ``ATEN_CPU_CAPABILITY`` forbids torch is not used by the kernels, and does not count for ``auto``."""
    features = ("avx2", "fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "amx_bf16")
    monkeypatch.setattr(device, "_capabilities", lambda: dict.fromkeys(features, True))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    assert (has_avx2(), has_avx512(), has_amx(), has_native_bfloat16()) == (avx2, avx512, avx512, avx512)


def test_an_arm_cpu_has_no_instruction_set_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch names other features there, so every question is answered with no."""
    monkeypatch.setattr(device, "_capabilities", lambda: {"architecture": "aarch64", "sve": True, "bf16": True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")

    assert [has_avx2(), has_avx512(), has_amx(), has_native_bfloat16()] == [False] * 4


def test_threads_are_the_setting_or_all_cores() -> None:
    """Without a setting the forward pass gets every core that the process may use."""
    assert resolve_threads(3) == 3
    assert 1 <= resolve_threads(None) <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, expected: bool) -> None:
    """CUDA's, Python's and the CPU allocator's errors count as out of memory; other errors do not."""
    assert is_out_of_memory(error) is expected


def test_huge_pages_are_enabled_before_torch_allocates() -> None:
    """Importing the engine changes no setting and allocates nothing, so large tensors start at page boundaries."""
    program = (
        "import mmap, os, service.engines.torch, torch\n"
        "from service.engines.devices.device import THP_VARIABLE, enable_huge_pages\n"
        "assert THP_VARIABLE not in os.environ\n"
        "enable_huge_pages()\n"
        "tensors = [torch.empty(2**22 + 100 * turn) for turn in range(4)]\n"
        "print(all(tensor.data_ptr() % mmap.PAGESIZE == 0 for tensor in tensors))"
    )

    environment = {name: value for name, value in os.environ.items() if name != THP_VARIABLE}

    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=250
    )

    assert found.stdout.split() == ["True"]
