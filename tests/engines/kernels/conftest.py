"""Fixtures: the CPU kernels of each target that this machine can run, and those that it would choose."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from service.engines.devices.device import has_amx, has_avx2, has_avx512, has_avx512_bf16, has_avx512_vnni
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.build import (
    AMX_BF16,
    AVX2_F32,
    AVX512_BF16,
    AVX512_F32,
    AVX512_FLOAT,
    AVX512_VNNI,
    LIBRARY,
    TARGETS,
    KernelsUnavailable,
    Target,
    compile_kernels,
    locate_library,
)
from service.engines.kernels.choice import load_kernels

EMULATED_AMX = Target(
    AMX_BF16.name,
    (
        *AVX512_BF16.flags,
        "-UUSE_AVX512_BF16",
        "-DUSE_AMX_BF16",
        "-include",
        str(Path(__file__).parent / "emulated_amx.h"),
    ),
)
"""The kernels for AMX, on a CPU without it."""


@pytest.fixture(scope="session", params=TARGETS, ids=lambda target: target.name)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels of each target; AMX is emulated on a CPU without it."""
    target: Target = request.param
    runs = {
        AVX2_F32: has_avx2(),
        AVX512_FLOAT: has_avx512(),
        AVX512_F32: has_avx512(),
        AVX512_VNNI: has_avx512() and has_avx512_vnni(),
    }
    if not runs.get(target, has_avx512() and has_avx512_bf16()):
        pytest.skip(f"this CPU does not support the kernels for {target.name}")
    try:
        if target is not AMX_BF16:
            return Kernels(ctypes.CDLL(str(locate_library(target))), target)
        if has_amx():
            return load_kernels()  # requests permission to use AMX
        folder = tmp_path_factory.mktemp("emulated")
        compile_kernels(EMULATED_AMX, folder)
    except KernelsUnavailable as reason:
        pytest.skip(f"the CPU kernels are not available: {reason}")
    return Kernels(ctypes.CDLL(str(folder / LIBRARY)), EMULATED_AMX)


@pytest.fixture(scope="session")
def machine_kernels() -> Kernels:
    """The kernels that this machine would choose."""
    try:
        return load_kernels()
    except KernelsUnavailable as reason:
        pytest.skip(f"the CPU kernels are not available: {reason}")
