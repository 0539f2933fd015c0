"""The kernels of this machine, for tests that need them."""

from __future__ import annotations

import pytest

from service.engines.kernels.build import KernelsUnavailable
from service.engines.kernels.library import Kernels, load_kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """Kernels of either kind; without units for bfloat16 or a compiler there are none to test."""
    try:
        return load_kernels()
    except KernelsUnavailable as reason:
        pytest.skip(f"no kernels here: {reason}")


@pytest.fixture(scope="session")
def tiles(kernels: Kernels) -> Kernels:
    """Kernels with products and attention."""
    if not kernels.has_tiles:
        pytest.skip("this CPU has no matrix tiles (AMX)")
    return kernels
