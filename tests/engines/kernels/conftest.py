"""The kernels for each kind of CPU, as far as this one can run them, for tests that need them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from service.engines.device import has_bfloat16_vectors, has_int8_vectors, has_matrix_tiles, has_wide_vectors
from service.engines.kernels.build import (
    INTEGERS,
    LIBRARY,
    PAIRS,
    SINGLES,
    TARGETS,
    TILES,
    KernelsUnavailable,
    Target,
    compile_kernels,
    locate_library,
)
from service.engines.kernels.library import Kernels, load_kernels

EMULATED_TILES = Target(
    TILES.name,
    (*PAIRS.flags, "-UWITH_PAIRS", "-DWITH_AMX", "-include", str(Path(__file__).parent / "emulated_tiles.h")),
)
"""The kernels for matrix tiles, on a CPU that has none."""


@pytest.fixture(scope="session", params=TARGETS, ids=lambda target: target.name)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Kernels of each kind; matrix tiles are emulated where there are none."""
    target: Target = request.param
    runs = {SINGLES: True, INTEGERS: has_int8_vectors()}.get(target, has_bfloat16_vectors())
    if not has_wide_vectors() or not runs:
        pytest.skip(f"this CPU runs no kernels for {target.name}")
    try:
        if target is not TILES:
            return Kernels(ctypes.CDLL(str(locate_library(target))), target)
        if has_matrix_tiles():
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
