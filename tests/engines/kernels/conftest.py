"""The kernels for each kind of CPU, as far as this one can run them, for tests that need them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from service.engines.devices.device import has_amx, has_avx512, has_avx512_bf16, has_avx512_vnni
from service.engines.kernels.bindings import Kernels, load_kernels
from service.engines.kernels.build import (
    AMX_BF16,
    AVX512_BF16,
    AVX512_F32,
    AVX512_VNNI,
    LIBRARY,
    TARGETS,
    KernelsUnavailable,
    Target,
    compile_kernels,
    locate_library,
)

EMULATED_TILES = Target(
    AMX_BF16.name,
    (*AVX512_BF16.flags, "-UWITH_PAIRS", "-DWITH_AMX", "-include", str(Path(__file__).parent / "emulated_tiles.h")),
)
"""The kernels for matrix tiles, on a CPU that has none."""


@pytest.fixture(scope="session", params=TARGETS, ids=lambda target: target.name)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Kernels of each kind; matrix tiles are emulated where there are none."""
    target: Target = request.param
    runs = {AVX512_F32: True, AVX512_VNNI: has_avx512_vnni()}.get(target, has_avx512_bf16())
    if not has_avx512() or not runs:
        pytest.skip(f"this CPU runs no kernels for {target.name}")
    try:
        if target is not AMX_BF16:
            return Kernels(ctypes.CDLL(str(locate_library(target))), target)
        if has_amx():
            return load_kernels()  # which asks the operating system for its tiles
        folder = tmp_path_factory.mktemp("emulated")
        compile_kernels(EMULATED_TILES, folder)
    except KernelsUnavailable as reason:
        pytest.skip(f"no kernels here: {reason}")
    return Kernels(ctypes.CDLL(str(folder / LIBRARY)), EMULATED_TILES)


@pytest.fixture(scope="session")
def machine_kernels() -> Kernels:
    """The kernels that this machine would take."""
    try:
        return load_kernels()
    except KernelsUnavailable as reason:
        pytest.skip(f"no kernels here: {reason}")
