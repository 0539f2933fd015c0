"""The C interface of the compiled kernels: their argument structs, declared for ctypes as in ``csrc/kernel_args.h``.

Each kernel takes a pointer to one struct, which is created for the call, so threads share nothing mutable. The sizes of
the structs are compared with the library's when it is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

Fields = list[tuple[str, Any]]

MAX_PROJECTIONS = 3
"""Most linear layers that ``norm_qkv`` multiplies with."""


class NormParams(Structure):
    """A root mean square norm."""

    _fields_: ClassVar[Fields] = [("weight", c_void_p), ("epsilon", c_float), ("kind", c_int32)]


class LinearWeight(Structure):
    """A packed weight of a linear layer and its bias."""

    _fields_: ClassVar[Fields] = [
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int32),
        ("format", c_int32),
    ]


class GatedMlpWeights(Structure):
    """The packed weights of a gated feed-forward layer."""

    _fields_: ClassVar[Fields] = [
        ("gate_up_panels", c_void_p),
        ("down_panels", c_void_p),
        ("inner", c_int32),
        ("activation", c_int32),
        ("format", c_int32),
    ]


class RmsNormArgs(Structure):
    """Arguments of ``rms_norm``."""

    _fields_: ClassVar[Fields] = [
        ("states", c_void_p),
        ("output", c_void_p),
        ("norm", NormParams),
        ("num_rows", c_int64),
        ("width", c_int32),
        ("num_threads", c_int32),
    ]


class ApplyRopeArgs(Structure):
    """Arguments of ``apply_rope``."""

    _fields_: ClassVar[Fields] = [
        ("states", c_void_p),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("num_tokens", c_int32),
        ("num_heads", c_int32),
        ("rotary_size", c_int32),
        ("num_threads", c_int32),
    ]


class ActAndMulArgs(Structure):
    """Arguments of ``act_and_mul``."""

    _fields_: ClassVar[Fields] = [
        ("gate", c_void_p),
        ("up", c_void_p),
        ("num_elements", c_int64),
        ("activation", c_int32),
        ("num_threads", c_int32),
    ]


class LinearArgs(Structure):
    """Arguments of ``linear``."""

    _fields_: ClassVar[Fields] = [
        ("states", c_void_p),
        ("output", c_void_p),
        ("weight", LinearWeight),
        ("num_rows", c_int32),
        ("width", c_int32),
        ("num_threads", c_int32),
    ]


class GatedMlpArgs(Structure):
    """Arguments of ``gated_mlp``."""

    _fields_: ClassVar[Fields] = [
        ("states", c_void_p),
        ("output", c_void_p),
        ("mlp", GatedMlpWeights),
        ("num_rows", c_int32),
        ("width", c_int32),
        ("num_threads", c_int32),
    ]


class NormQkvArgs(Structure):
    """Arguments of ``norm_qkv``."""

    _fields_: ClassVar[Fields] = [
        ("states", c_void_p),
        ("norm", NormParams),
        ("projections", LinearWeight * MAX_PROJECTIONS),
        ("outputs", c_void_p * MAX_PROJECTIONS),
        ("num_projections", c_int32),
        ("num_rows", c_int32),
        ("width", c_int32),
        ("num_threads", c_int32),
    ]


class AttnOutMlpArgs(Structure):
    """Arguments of ``attn_out_mlp``."""

    _fields_: ClassVar[Fields] = [
        ("states", c_void_p),
        ("attended", c_void_p),
        ("attn_out", LinearWeight),
        ("norm", NormParams),
        ("mlp", GatedMlpWeights),
        ("num_rows", c_int32),
        ("width", c_int32),
        ("attended_width", c_int32),
        ("num_threads", c_int32),
    ]


class HeadsView(Structure):
    """States of attention heads, by the strides of tokens and heads in elements."""

    _fields_: ClassVar[Fields] = [("states", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64)]


class AttentionArgs(Structure):
    """Arguments of ``attention``."""

    _fields_: ClassVar[Fields] = [
        ("query", HeadsView),
        ("key", HeadsView),
        ("value", HeadsView),
        ("output", c_void_p),
        ("sequences", c_void_p),
        ("spans", c_void_p),
        ("num_sequences", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("window", c_int32),
        ("num_threads", c_int32),
    ]


KERNEL_ARGS: dict[str, type[Structure]] = {
    "rms_norm": RmsNormArgs,
    "apply_rope": ApplyRopeArgs,
    "act_and_mul": ActAndMulArgs,
    "linear": LinearArgs,
    "gated_mlp": GatedMlpArgs,
    "norm_qkv": NormQkvArgs,
    "attn_out_mlp": AttnOutMlpArgs,
    "attention": AttentionArgs,
}
"""The exported kernels, each with the struct that it takes."""


def check_struct_sizes(library: ctypes.CDLL) -> None:
    """Compare the sizes of the argument structs with the library's.

    Raises:
        RuntimeError: this module and ``kernel_args.h`` declare different structs.
    """
    for struct in KERNEL_ARGS.values():
        size_in_library = getattr(library, f"sizeof_{struct.__name__}")
        size_in_library.argtypes, size_in_library.restype = (), c_int64
        if size_in_library() != ctypes.sizeof(struct):
            raise RuntimeError(
                f"The compiled kernels declare {struct.__name__} with {size_in_library()} bytes, "
                f"the Python binding with {ctypes.sizeof(struct)}"
            )


def kernel_function(library: ctypes.CDLL, name: str) -> Callable[[Structure], None]:
    """Return an exported kernel as a function of its argument struct."""
    function = getattr(library, name)
    function.argtypes, function.restype = (POINTER(KERNEL_ARGS[name]),), None
    call: Callable[[Structure], None] = function  # ctypes passes a struct by reference where a pointer is declared
    return call


def packing_function(library: ctypes.CDLL, name: str, num_weights: int) -> Callable[..., None]:
    """Return a function that packs weights: weights, outputs, width, format, panels, threads."""
    function = getattr(library, name)
    function.argtypes = (*[c_void_p] * num_weights, c_int32, c_int32, c_int32, c_void_p, c_int32)
    function.restype = None
    call: Callable[..., None] = function
    return call


def panel_bytes_function(library: ctypes.CDLL) -> Callable[[int, int], int]:
    """Return the function that gives the bytes of a packed panel of a weight of some width in some format."""
    function = library.packed_panel_bytes
    function.argtypes, function.restype = (c_int32, c_int32), c_int64
    call: Callable[[int, int], int] = function
    return call
