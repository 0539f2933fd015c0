"""The kernels as functions of tensors: C types and pointers stay in here.

It knows neither models nor modules. All tensors are on the CPU: states, weights and biases in bfloat16, with contiguous
rows, packed weights in bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch

from service.engines.kernels.build import KernelsUnavailable, Target, locate_library, target_of_machine
from service.errors import SettingsError

STEP = 32
"""Of what the inner dimension of a product must be a multiple."""


class Norm(IntEnum):
    """Where a root mean square norm rounds, and what it multiplies with; the same numbers as in ``elementwise.cpp``."""

    ROUNDED_FIRST = 0
    ONE_PLUS_WEIGHT = 1
    ROUNDED_LAST = 2


class Activation(IntEnum):
    """What opens a gate; the same numbers as in ``numbers.h``."""

    SILU = 0
    GELU_TANH = 1


@cache
def load_kernels(*, quantizes: bool = False) -> Kernels:
    """Return the kernels for this machine, loaded once a process; ``quantizes``: those with linear layers in int8.

    Raises:
        KernelsUnavailable: this machine cannot have them; the message says why.
    """
    target = target_of_machine(quantizes=quantizes)
    path = locate_library(target)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"they cannot be loaded: {error}") from None
    if not library.ask_permission():
        raise KernelsUnavailable("the operating system does not let this process use matrix tiles")
    return Kernels(library, target)


def kernels_for(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[Kernels | None, str]:
    """Return the kernels that the setting wants on this device in this arithmetic, and in words why there are none.

    Raises:
        SettingsError: the setting is ``on`` and there are none.
    """
    try:
        if choice == "off":
            return None, "they are switched off"
        _check_place(device, dtype)
        return load_kernels(), ""
    except KernelsUnavailable as missing:
        if choice == "on":
            raise SettingsError(f"model.kernels is on, but there are none: {missing}") from None
        return None, str(missing)


def int8_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the kernels whose linear layers multiply in int8, for states in bfloat16.

    Raises:
        SettingsError: there are none.
    """
    try:
        _check_place(device, dtype)
        return load_kernels(quantizes=True)
    except KernelsUnavailable as missing:
        raise SettingsError(f"model.quantization is int8, but there are no kernels for it: {missing}") from None


def _check_place(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cpu" or dtype != torch.bfloat16:
        raise KernelsUnavailable(f"they compute bfloat16 on a CPU, not {str(dtype).removeprefix('torch.')} on {device}")


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """A root mean square norm with its weight [width]."""

    weight: torch.Tensor
    epsilon: float
    kind: Norm


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as products read it (bytes), with as many outputs, and their bias [outputs]."""

    panels: torch.Tensor
    outputs: int
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedGates:
    """The weights of a gated feed-forward layer: gate and up in turns, down; ``inner``: outputs of gate and up each."""

    panels: torch.Tensor
    inner: int
    down: torch.Tensor
    activation: Activation


_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class Kernels:
    """Functions of bfloat16 tensors on the CPU, computed by as many threads as torch's own would be."""

    def __init__(self, library: ctypes.CDLL, target: Target) -> None:
        self.name = target.name
        self.has_tiles = target.has_tiles
        self.quantizes = target.quantizes
        self._rms_norm = _function(library, "rms_norm", _POINTER, _LONG, _INT, _POINTER, _FLOAT, _INT, _POINTER, _INT)
        self._rotate = _function(library, "rotate", _POINTER, _LONG, _LONG, _INT, _INT, _POINTER, _POINTER, _INT, _INT)
        self._open_gate = _function(library, "open_gate", _POINTER, _POINTER, _LONG, _INT, _INT)
        self._bytes_of_panel = library.bytes_of_panel
        self._bytes_of_panel.argtypes, self._bytes_of_panel.restype = (_INT,), _LONG
        self._pack_weight = _function(library, "pack_weight", _POINTER, _INT, _INT, _POINTER, _INT)
        self._pack_gated = _function(library, "pack_gated", _POINTER, _POINTER, _INT, _INT, _POINTER, _INT)
        self._linear = _function(library, "linear", _POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT)
        self._gated_layer = _function(
            library, "gated_layer", _POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT
        )
        norm = (_POINTER, _FLOAT, _INT)
        self._project = _function(
            library, "project", _POINTER, _INT, _INT, *norm, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _INT
        )
        self._conclude = _function(
            library, "conclude", _POINTER, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, *norm, _POINTER, _INT,
            _POINTER, _INT, _INT,
        )  # fmt: skip
        strided = (_POINTER, _LONG, _LONG)
        counts = (_INT, _INT, _INT)
        layout = (_POINTER, _INT, _POINTER)
        self._attend = _function(
            library, "attend", *strided, *strided, *strided, _POINTER, *counts, *layout, _FLOAT, _INT, _FLOAT, _INT
        )

    def rms_norm(self, states: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Return the norms of states [..., width]."""
        states = states.contiguous()
        output = torch.empty_like(states)
        width = states.shape[-1]
        self._rms_norm(
            states.data_ptr(), states.numel() // width, width, norm.weight.data_ptr(), norm.epsilon, norm.kind,
            output.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return output

    def rotate(self, states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        """Turn, in place, the first numbers of each head of states [1, heads, tokens, head size].

        ``cosines`` and ``sines``: contiguous [tokens, numbers to turn]; pairs are half of these apart (RoFormer, arXiv
        2104.09864, as Llama lays it out).
        """
        _, num_heads, num_tokens, _ = states.shape
        self._rotate(
            states.data_ptr(), states.stride(2), states.stride(1), num_tokens, num_heads, cosines.data_ptr(),
            sines.data_ptr(), cosines.shape[-1], torch.get_num_threads(),
        )  # fmt: skip

    def open_gate(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Write ``activation(gate) * up`` over the gate, and return it; both are contiguous."""
        self._open_gate(gate.data_ptr(), up.data_ptr(), gate.numel(), activation, torch.get_num_threads())
        return gate

    def pack_weight(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedWeight:
        """Lay a weight [outputs, width] out as products read it; width is a multiple of 32."""
        outputs, width = weight.shape
        weight = weight.contiguous()
        panels = self._new_panels(-(-outputs // STEP), width)
        self._pack_weight(weight.data_ptr(), outputs, width, panels.data_ptr(), torch.get_num_threads())
        return PackedWeight(panels, outputs, bias)

    def pack_gates(
        self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activation: Activation
    ) -> PackedGates:
        """Lay out the weights of a gated layer: [inner, width] twice, and [width, inner]; all multiples of 32."""
        inner, width = gate.shape
        panels = self._new_panels(2 * inner // STEP, width)
        gate, up = gate.contiguous(), up.contiguous()
        self._pack_gated(gate.data_ptr(), up.data_ptr(), inner, width, panels.data_ptr(), torch.get_num_threads())
        return PackedGates(panels, inner, self.pack_weight(down).panels, activation)

    def _new_panels(self, num_panels: int, width: int) -> torch.Tensor:
        return torch.empty(num_panels * self._bytes_of_panel(width), dtype=torch.uint8)

    def linear(self, states: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Return [..., outputs] of states [..., width]."""
        states = states.contiguous()
        width = states.shape[-1]
        output = states.new_empty((*states.shape[:-1], weight.outputs))
        self._linear(
            states.data_ptr(), states.numel() // width, width, weight.panels.data_ptr(), weight.outputs,
            _pointer(weight.bias), output.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return output

    def gated_layer(self, states: torch.Tensor, gates: PackedGates) -> torch.Tensor:
        """Return ``down(activation(gate(states)) * up(states))`` for states [..., width]."""
        states = states.contiguous()
        output = torch.empty_like(states)
        width = states.shape[-1]
        self._gated_layer(
            states.data_ptr(), states.numel() // width, width, gates.panels.data_ptr(), gates.inner,
            gates.down.data_ptr(), gates.activation, output.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return output

    def project(self, states: torch.Tensor, norm: RmsNorm, weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
        """Return the products of the norm of states [..., width] with packed weights, [..., outputs] each."""
        states = states.contiguous()
        width = states.shape[-1]
        products = [states.new_empty((*states.shape[:-1], weight.outputs)) for weight in weights]
        self._project(
            states.data_ptr(), states.numel() // width, width, norm.weight.data_ptr(), norm.epsilon, norm.kind,
            len(weights), _pointers(weight.panels for weight in weights),
            (_INT * len(weights))(*(weight.outputs for weight in weights)),
            _pointers(weight.bias for weight in weights), _pointers(products), torch.get_num_threads(),
        )  # fmt: skip
        return products

    def conclude(
        self, states: torch.Tensor, attended: torch.Tensor, output: PackedWeight, norm: RmsNorm, gates: PackedGates
    ) -> None:
        """Add, in place, to contiguous states [..., width] what a block makes of attended heads [..., heads' width].

        First the product of the attended heads with the output weight, then the feed-forward layer of the sums' norm.
        """
        attended = attended.contiguous()
        width = states.shape[-1]
        self._conclude(
            states.data_ptr(), attended.data_ptr(), states.numel() // width, width, attended.shape[-1],
            output.panels.data_ptr(), _pointer(output.bias), norm.weight.data_ptr(), norm.epsilon, norm.kind,
            gates.panels.data_ptr(), gates.inner, gates.down.data_ptr(), gates.activation, torch.get_num_threads(),
        )  # fmt: skip

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        sequences: torch.Tensor,
        spans: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Attend causally within each sequence of a row and write [1, tokens, heads, head size] into the output.

        Args:
            query: [1, heads, tokens, head size]; ``key`` and ``value`` with fewer heads, and the tokens of spans.
            key: see ``query``.
            value: see ``query``.
            output: contiguous; tokens that belong to no strand are left alone.
            sequences: int32 [sequences, 5]: first own token, own tokens, tokens before them, first span, spans.
            spans: int32 [spans, 2]: first and one-past-last token of each piece.
            scaling: factor on the scores.
            window: tokens that a query sees, itself included; None: all before it.
            softcap: scores are bent to ``softcap * tanh(score / softcap)``; None: left as they are.
        """
        strided = [(states.data_ptr(), states.stride(2), states.stride(1)) for states in (query, key, value)]
        self._attend(
            *strided[0], *strided[1], *strided[2], output.data_ptr(), query.shape[1], key.shape[1], query.shape[3],
            sequences.data_ptr(), len(sequences), spans.data_ptr(), scaling, window or 0, softcap or 0.0,
            torch.get_num_threads(),
        )  # fmt: skip


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(tensors: Iterable[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    pointers = [_pointer(tensor) for tensor in tensors]
    return (_POINTER * len(pointers))(*pointers)


def _function(library: ctypes.CDLL, name: str, *arguments: type) -> Callable[..., None]:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    call: Callable[..., None] = function
    return call
