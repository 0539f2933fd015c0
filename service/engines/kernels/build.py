"""The compiled library of the kernels: found where it was installed or kept, or made by a C++ compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.cache import build_once, cache_directory
from service.engines.devices.device import (
    has_amx,
    has_avx512,
    has_avx512_bf16,
    has_avx512_vnni,
    is_intel,
)

SOURCES = Path(__file__).parent / "csrc"
BUILT = SOURCES / "built"
"""Where kernels lie that came with the installation, as in a container; elsewhere there is no such folder."""

LIBRARY = "kernels.so"
COMPILE_S = 300.0

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno")


class KernelsUnavailable(Exception):
    """This machine has no use for the kernels, or they cannot be made on it; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of CPU, by what multiplies on it."""

    name: str
    flags: tuple[str, ...]

    @property
    def has_tiles(self) -> bool:
        """Whether products run on matrix tiles (AMX)."""
        return "-DWITH_AMX" in self.flags

    @property
    def quantizes(self) -> bool:
        """Whether linear layers multiply in int8."""
        return "-DWITH_INT8" in self.flags


_VECTORS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_PAIRS = (*_VECTORS, "-mavx512bf16")

AVX512_F32 = Target("avx512", _VECTORS)
"""fp32 vectors, into which bfloat16 is widened."""

AVX512_BF16 = Target("avx512-bf16", (*_PAIRS, "-DWITH_PAIRS"))
"""Vectors of pairs of bfloat16."""

AMX_BF16 = Target("amx-bf16", (*_PAIRS, "-mamx-tile", "-mamx-bf16", "-DWITH_AMX"))
"""Matrix tiles of bfloat16."""

AVX512_VNNI = Target("avx512-int8", (*_VECTORS, "-mavx512vnni", "-DWITH_INT8"))
"""Vectors of int8 for linear layers, of fp32 for attention."""

TARGETS = (AVX512_F32, AVX512_BF16, AMX_BF16, AVX512_VNNI)


def target_of_machine(*, quantizes: bool = False) -> Target:
    """Return the kind of CPU that this is, or for linear layers in int8 the one that has them.

    Without matrix tiles an Intel CPU multiplies bfloat16 at half the rate of fp32 (Sapphire Rapids: 90 and 170 GFLOP/s
    a core), an AMD one at twice the rate.

    Raises:
        KernelsUnavailable: it lacks what all kernels use.
    """
    if not has_avx512():
        raise KernelsUnavailable("this CPU has no AVX-512")
    if quantizes:
        if not has_avx512_vnni():
            raise KernelsUnavailable("this CPU has no vectors of int8 (AVX-512 VNNI)")
        return AVX512_VNNI
    if has_amx():
        return AMX_BF16
    return AVX512_BF16 if has_avx512_bf16() and not is_intel() else AVX512_F32


def source_digest(target: Target) -> str:
    """Return the digest over all that decides what is compiled, but for the compiler."""
    digest = hashlib.sha256("\0".join((*FLAGS, *target.flags)).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def compile_kernels(target: Target, folder: Path) -> None:
    """Write the library of this target into a folder; takes some seconds.

    Raises:
        KernelsUnavailable: there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise KernelsUnavailable(f"there is no C++ compiler ({compiler}) to make them with: install g++")
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    command = [compiler, *FLAGS, *target.flags, *sources, "-o", str(folder / LIBRARY)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_S)  # noqa: S603 - our own sources
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{compiler} did not end within {COMPILE_S:g} s") from None
    if finished.returncode != 0:
        errors = [line for line in finished.stderr.splitlines() if "error" in line]
        raise KernelsUnavailable(f"{compiler} failed: {(errors or ['it gave no reason'])[0]}")


def locate_library(target: Target) -> Path:
    """Return the library of this target: the one that was installed, or else the one in the cache, made when missing.

    Raises:
        KernelsUnavailable: it can be neither found nor made.
    """
    name = f"{target.name}-{source_digest(target)}"
    installed = BUILT / name / LIBRARY
    if installed.is_file():
        return installed
    try:
        folder = build_once(cache_directory() / "kernels" / name, partial(compile_kernels, target))
    except OSError as error:
        raise KernelsUnavailable(f"they cannot be kept: {error}") from None
    return folder / LIBRARY


def build_all(folder: Path, targets: Sequence[Target] = TARGETS) -> None:
    """Compile the kernels for all kinds of CPU, as a container image does; none of them is run.

    Raises:
        KernelsUnavailable: there is no C++ compiler, or it fails.
    """
    for target in targets:
        name = f"{target.name}-{source_digest(target)}"
        build_once(folder / name, partial(compile_kernels, target))
