"""The choice of the compiled kernels for this machine and a dtype, and the reason where there are none."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from service.engines.devices.device import has_avx2
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.build import Arithmetic, KernelsUnavailable, locate_library, target_of_machine
from service.errors import SettingsError


@cache
def load_kernels(arithmetic: Arithmetic = "bfloat16") -> Kernels:
    """Return the kernels for this machine, loaded once in a process.

    Raises:
        KernelsUnavailable: this machine cannot run them; the message states the reason.
    """
    target = target_of_machine(arithmetic)
    path = locate_library(target)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"the compiled library cannot be loaded: {error}") from None
    if not library.request_amx_permission():
        raise KernelsUnavailable("the operating system does not permit this process to use AMX tiles")
    return Kernels(library, target)


def kernels_for(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[Kernels | None, str]:
    """Return the kernels that ``model.kernels`` selects for this device and dtype, or None and the reason.

    Raises:
        SettingsError: the setting is ``on`` and no kernels are available.
    """
    try:
        if choice == "off":
            return None, "they are switched off"
        return load_kernels(_arithmetic_of(device, dtype)), ""
    except KernelsUnavailable as reason:
        if choice == "on":
            raise SettingsError(f"model.kernels is on, but the CPU kernels are not available: {reason}") from None
        return None, str(reason)


def int8_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the kernels whose linear layers multiply in int8, for states in bfloat16.

    Raises:
        SettingsError: they are not available.
    """
    try:
        _check_int8(device, dtype)
        return load_kernels("int8")
    except KernelsUnavailable as reason:
        raise SettingsError(f"model.quantization is int8, but the CPU kernels are not available: {reason}") from None


def would_gain(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether passes in this dtype are much slower without the kernels: in bfloat16, and in float32 where they run."""
    if device.type != "cpu":
        return False
    return dtype == torch.bfloat16 or (dtype == torch.float32 and has_avx2())


def _arithmetic_of(device: torch.device, dtype: torch.dtype) -> Arithmetic:
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "bfloat16"
    if device.type == "cpu" and dtype == torch.float32:
        return "float32"
    name = str(dtype).removeprefix("torch.")
    raise KernelsUnavailable(f"they compute bfloat16 and float32 on a CPU, not {name} on {device}")


def _check_int8(device: torch.device, dtype: torch.dtype) -> None:
    if _arithmetic_of(device, dtype) != "bfloat16":
        raise KernelsUnavailable("they compute int8 with states in bfloat16, not float32")
