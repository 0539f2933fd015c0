"""The shared library of the CPU kernels: found in the installation or in the user's cache, or compiled into it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from service.cache import build_once, cache_directory
from service.engines.devices.device import (
    has_amx,
    has_avx2,
    has_avx512,
    has_avx512_bf16,
    has_avx512_vnni,
    is_intel,
)

SOURCES = Path(__file__).parent / "csrc"
BUILT = Path(__file__).parent / "built"
"""Libraries that were compiled into the installation, as in a container image; elsewhere the folder does not exist."""

LIBRARY = "kernels.so"
COMPILE_TIMEOUT_S = 300.0

Arithmetic: TypeAlias = Literal["float32", "bfloat16", "int8"]
"""The dtype of states; ``int8``: bfloat16, with linear layers that multiply in int8."""

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno")


class KernelsUnavailable(Exception):
    """This machine cannot run the kernels, or cannot compile them; the message states the reason."""


@dataclass(frozen=True, slots=True)
class Target:
    """An instruction set for which the kernels are compiled."""

    name: str
    """The name in the description of the engine."""

    flags: tuple[str, ...]
    """Compiler options, macros included."""

    @property
    def has_amx(self) -> bool:
        """Whether products run on AMX tiles."""
        return "-DUSE_AMX_BF16" in self.flags

    @property
    def is_int8(self) -> bool:
        """Whether linear layers multiply in int8."""
        return "-DUSE_AVX512_VNNI" in self.flags

    @property
    def is_float32(self) -> bool:
        """Whether states, weights and biases are fp32; else they are bfloat16."""
        return "-DFLOAT_STATES" in self.flags


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_BF16 = (*_AVX512, "-mavx512bf16")

AVX512_F32 = Target("avx512", _AVX512)
"""Products of fp32 vectors, to which bfloat16 is widened."""

AVX512_FLOAT = Target("avx512-float32", (*_AVX512, "-DFLOAT_STATES"))
"""Products of fp32 vectors, with states in fp32."""

AVX512_BF16 = Target("avx512-bf16", (*_BF16, "-DUSE_AVX512_BF16"))
"""Products of vectors of bfloat16 pairs."""

AMX_BF16 = Target("amx-bf16", (*_BF16, "-mamx-tile", "-mamx-bf16", "-DUSE_AMX_BF16"))
"""Products of bfloat16 tiles."""

AVX512_VNNI = Target("avx512-int8", (*_AVX512, "-mavx512vnni", "-DUSE_AVX512_VNNI"))
"""Products of int8 vectors in linear layers, of fp32 vectors in attention."""

AVX2_F32 = Target("avx2", ("-mavx2", "-mfma", "-DUSE_AVX2", "-DFLOAT_STATES"))
"""Products of fp32 vectors, with states in fp32."""

TARGETS = (AVX2_F32, AVX512_FLOAT, AVX512_F32, AVX512_BF16, AMX_BF16, AVX512_VNNI)


def target_of_machine(arithmetic: Arithmetic = "bfloat16") -> Target:
    """Return the fastest target for this arithmetic that this CPU supports.

    Without AMX an Intel CPU multiplies bfloat16 at half the rate of fp32 (Sapphire Rapids: 90 and 170 GFLOP/s a core),
    an AMD CPU at twice the rate.

    Raises:
        KernelsUnavailable: the CPU lacks an instruction set that is required, or torch is faster on it.
    """
    if arithmetic == "float32":
        return _float32_target()
    if not has_avx512():
        raise KernelsUnavailable("this CPU has no AVX-512, which they need in bfloat16")
    if arithmetic == "int8":
        if not has_avx512_vnni():
            raise KernelsUnavailable("this CPU has no AVX-512 VNNI, which int8 needs")
        return AVX512_VNNI
    if has_amx():
        return AMX_BF16
    return AVX512_BF16 if has_avx512_bf16() and not is_intel() else AVX512_F32


def _float32_target() -> Target:
    if has_avx512():
        return AVX512_FLOAT
    if not has_avx2():
        raise KernelsUnavailable("this CPU has neither AVX-512 nor AVX2 with FMA")
    return AVX2_F32


def source_digest(target: Target) -> str:
    """Return the digest of the sources and compiler options; the compiler itself is not part of it."""
    digest = hashlib.sha256("\0".join((*FLAGS, *target.flags)).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def compile_kernels(target: Target, folder: Path) -> None:
    """Compile the library of this target into a folder; takes some seconds.

    Raises:
        KernelsUnavailable: no C++ compiler is installed, or it fails.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise KernelsUnavailable(f"no C++ compiler ({compiler}) is installed to compile them: install g++")
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    command = [compiler, *FLAGS, *target.flags, *sources, "-o", str(folder / LIBRARY)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S)  # noqa: S603 - the sources of this package
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{compiler} did not finish within {COMPILE_TIMEOUT_S:g} s") from None
    if finished.returncode != 0:
        errors = [line for line in finished.stderr.splitlines() if "error" in line]
        raise KernelsUnavailable(f"{compiler} failed: {(errors or ['no error message'])[0]}")


def locate_library(target: Target) -> Path:
    """Return the library of this target: the installed one, else the one in the cache, which is compiled if missing.

    Raises:
        KernelsUnavailable: it can be neither found nor compiled.
    """
    name = f"{target.name}-{source_digest(target)}"
    installed = BUILT / name / LIBRARY
    if installed.is_file():
        return installed
    try:
        folder = build_once(cache_directory() / "kernels" / name, partial(compile_kernels, target))
    except OSError as error:
        raise KernelsUnavailable(f"they cannot be written to the cache: {error}") from None
    return folder / LIBRARY


def build_all(folder: Path, targets: Sequence[Target] = TARGETS) -> None:
    """Compile the kernels of all targets into a folder, as for a container image; none of them is run.

    Raises:
        KernelsUnavailable: no C++ compiler is installed, or it fails.
    """
    for target in targets:
        name = f"{target.name}-{source_digest(target)}"
        build_once(folder / name, partial(compile_kernels, target))
