"""The compiled CPU kernels as functions of tensors.

All tensors are on the CPU: states, weights and biases in the dtype of the kernels, with contiguous rows; packed weights
in bytes.
``choice`` loads them; ``fused_modules`` applies them to modules; ``abi`` defines the C types and struct layouts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from service.engines.kernels import abi
from service.engines.kernels.build import Target

STEP = 32
"""The inner dimension of a product must be a multiple of this; also the outputs of one packed panel."""


class Norm(IntEnum):
    """Where a root mean square norm rounds and what it multiplies by; the same values as in ``rms_norm.h``."""

    ROUND_BEFORE_WEIGHT = 0
    """The normalized states are rounded to the dtype, then multiplied by the weight (Llama)."""

    ONE_PLUS_WEIGHT = 1
    """The factor is one plus the weight, and the product is rounded (Gemma)."""

    ROUND_AFTER_WEIGHT = 2
    """The normalized states are multiplied by the weight in fp32, and the product is rounded."""


class Activation(IntEnum):
    """The activation of a gate; the same values as in ``simd.h``."""

    SILU = 0
    GELU_TANH = 1


class PanelFormat(IntEnum):
    """How panels store weights; the same values as in ``kernel_args.h``."""

    NATIVE = 0
    """In the dtype of the kernels, or in the integers of the int8 kernels."""

    AS_BF16 = 1
    """fp32 weights that bfloat16 represents exactly: half the memory, and the same bits in every result."""


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """A root mean square norm."""

    weight: torch.Tensor
    """[width]."""

    epsilon: float

    kind: Norm

    def as_struct(self) -> abi.NormParams:
        """Return the norm as kernels take it; valid while the tensors live."""
        return abi.NormParams(self.weight.data_ptr(), self.epsilon, self.kind)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the memory layout of the kernels' products (``csrc/panel_packing.h``)."""

    panels: torch.Tensor
    """Bytes."""

    outputs: int

    bias: torch.Tensor | None = None
    """[outputs]."""

    format: PanelFormat = PanelFormat.NATIVE

    def as_struct(self) -> abi.LinearWeight:
        """Return the weight as kernels take it; valid while the tensors live."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return abi.LinearWeight(self.panels.data_ptr(), bias, self.outputs, self.format)


@dataclass(frozen=True, slots=True)
class PackedGatedMlp:
    """The packed weights of a gated feed-forward layer without biases."""

    gate_up: torch.Tensor
    """Bytes; each panel holds 16 columns of gate and 16 of up."""

    inner: int
    """Outputs of gate and of up each."""

    down: torch.Tensor
    """Bytes."""

    activation: Activation

    format: PanelFormat = PanelFormat.NATIVE
    """Of all panels."""

    def as_struct(self) -> abi.GatedMlpWeights:
        """Return the weights as kernels take them; valid while the tensors live."""
        return abi.GatedMlpWeights(
            self.gate_up.data_ptr(), self.down.data_ptr(), self.inner, self.activation, self.format
        )


class Kernels:
    """The compiled kernels of one target, as functions of CPU tensors; they use torch's number of threads.

    Raises:
        RuntimeError: the library's argument structs are not those of ``abi``.
    """

    def __init__(self, library: ctypes.CDLL, target: Target) -> None:
        abi.check_struct_sizes(library)
        self.name = target.name
        self.has_amx = target.has_amx
        self.is_int8 = target.is_int8
        self.dtype = torch.float32 if target.is_float32 else torch.bfloat16
        self._packed_panel_bytes = abi.panel_bytes_function(library)
        self._pack_weight = abi.packing_function(library, "pack_weight", num_weights=1)
        self._pack_gate_up = abi.packing_function(library, "pack_gate_up", num_weights=2)
        self._call = {name: abi.kernel_function(library, name) for name in abi.KERNEL_ARGS}

    def rms_norm(self, states: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Return the norm of states [..., width]."""
        states = states.contiguous()
        output = torch.empty_like(states)
        args = abi.RmsNormArgs(
            states=states.data_ptr(),
            output=output.data_ptr(),
            norm=norm.as_struct(),
            **_rows_of(states),
        )
        self._call["rms_norm"](args)
        return output

    def apply_rope(self, states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        """Apply rotary position embeddings, in place, to the first elements of each head.

        The elements of a pair are half the rotary size apart (RoFormer, arXiv 2104.09864, in Llama's layout).

        Args:
            states: [1, heads, tokens, head size].
            cosines: contiguous [tokens, rotary size].
            sines: contiguous [tokens, rotary size].
        """
        _, num_heads, num_tokens, _ = states.shape
        args = abi.ApplyRopeArgs(
            states=states.data_ptr(),
            token_stride=states.stride(2),
            head_stride=states.stride(1),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            num_tokens=num_tokens,
            num_heads=num_heads,
            rotary_size=cosines.shape[-1],
            num_threads=torch.get_num_threads(),
        )
        self._call["apply_rope"](args)

    def act_and_mul(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Overwrite the gate with ``activation(gate) * up``, and return it; both are contiguous."""
        args = abi.ActAndMulArgs(
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            num_elements=gate.numel(),
            activation=activation,
            num_threads=torch.get_num_threads(),
        )
        self._call["act_and_mul"](args)
        return gate

    def pack_weight(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedWeight:
        """Pack a weight [outputs, width]; width is a multiple of 32."""
        return self._pack(weight, bias, self._format_for(weight))

    def pack_gated_mlp(
        self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activation: Activation
    ) -> PackedGatedMlp:
        """Pack the weights of a gated feed-forward layer; all dimensions are multiples of 32.

        Args:
            gate: [inner, width].
            up: [inner, width].
            down: [width, inner].
            activation: the activation of the gate.
        """
        inner, width = gate.shape
        format_ = self._format_for(gate, up, down)
        panels = self._new_panels(2 * inner // STEP, width, format_)
        gate, up = gate.contiguous(), up.contiguous()
        self._pack_gate_up(
            gate.data_ptr(), up.data_ptr(), inner, width, format_, panels.data_ptr(), torch.get_num_threads()
        )
        return PackedGatedMlp(panels, inner, self._pack(down, None, format_).panels, activation, format_)

    def _format_for(self, *weights: torch.Tensor) -> PanelFormat:
        """Return the smallest format that loses no bit of these weights."""
        is_exact = self.dtype == torch.float32 and all(
            torch.equal(weight.bfloat16().float(), weight) for weight in weights
        )
        return PanelFormat.AS_BF16 if is_exact else PanelFormat.NATIVE

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None, format_: PanelFormat) -> PackedWeight:
        outputs, width = weight.shape
        weight = weight.contiguous()
        panels = self._new_panels(-(-outputs // STEP), width, format_)
        self._pack_weight(weight.data_ptr(), outputs, width, format_, panels.data_ptr(), torch.get_num_threads())
        return PackedWeight(panels, outputs, bias, format_)

    def _new_panels(self, num_panels: int, width: int, format_: PanelFormat) -> torch.Tensor:
        return torch.empty(num_panels * self._packed_panel_bytes(width, format_), dtype=torch.uint8)

    def linear(self, states: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Return the product [..., outputs] of states [..., width] with a weight, bias added."""
        states = states.contiguous()
        output = states.new_empty((*states.shape[:-1], weight.outputs))
        args = abi.LinearArgs(
            states=states.data_ptr(),
            output=output.data_ptr(),
            weight=weight.as_struct(),
            **_rows_of(states),
        )
        self._call["linear"](args)
        return output

    def gated_mlp(self, states: torch.Tensor, mlp: PackedGatedMlp) -> torch.Tensor:
        """Return ``down(activation(gate(states)) * up(states))`` for states [..., width]."""
        states = states.contiguous()
        output = torch.empty_like(states)
        args = abi.GatedMlpArgs(
            states=states.data_ptr(),
            output=output.data_ptr(),
            mlp=mlp.as_struct(),
            **_rows_of(states),
        )
        self._call["gated_mlp"](args)
        return output

    def norm_qkv(self, states: torch.Tensor, norm: RmsNorm, projections: Sequence[PackedWeight]) -> list[torch.Tensor]:
        """Return the products [..., outputs] of the norm of states [..., width] with up to three packed weights."""
        states = states.contiguous()
        products = [states.new_empty((*states.shape[:-1], weight.outputs)) for weight in projections]
        args = abi.NormQkvArgs(
            states=states.data_ptr(),
            norm=norm.as_struct(),
            projections=tuple(weight.as_struct() for weight in projections),
            outputs=tuple(product.data_ptr() for product in products),
            num_projections=len(projections),
            **_rows_of(states),
        )
        self._call["norm_qkv"](args)
        return products

    def attn_out_mlp(
        self, states: torch.Tensor, attended: torch.Tensor, attn_out: PackedWeight, norm: RmsNorm, mlp: PackedGatedMlp
    ) -> None:
        """Run the part of a decoder block after attention, in place.

        The product of the attended heads with the output projection is added to the states, then the feed-forward layer
        of their norm.

        Args:
            states: contiguous [..., width]; the residual stream, overwritten.
            attended: [..., heads * head size].
            attn_out: the output projection of the attention layer.
            norm: the norm before the feed-forward layer.
            mlp: the feed-forward layer.
        """
        attended = attended.contiguous()
        args = abi.AttnOutMlpArgs(
            states=states.data_ptr(),
            attended=attended.data_ptr(),
            attn_out=attn_out.as_struct(),
            norm=norm.as_struct(),
            mlp=mlp.as_struct(),
            attended_width=attended.shape[-1],
            **_rows_of(states),
        )
        self._call["attn_out_mlp"](args)

    def attention(
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
        """Compute causal attention within each sequence of a packed batch.

        Args:
            query: [1, heads, tokens, head size].
            key: [1, key heads, tokens, head size]; with the tokens that the spans refer to.
            value: as ``key``.
            output: contiguous [1, tokens, heads, head size]; tokens that belong to no sequence are not written.
            sequences: int32 [sequences, 5]: first own token, number of own tokens, number of tokens before them, first
                span, number of spans.
            spans: int32 [spans, 2]: first and one-past-last key of each span.
            scaling: factor on the scores; positive.
            window: keys that a query attends to, its own included; None: all up to its own.
            softcap: scores become ``softcap * tanh(score / softcap)``; None: they are not capped.
        """
        args = abi.AttentionArgs(
            query=_heads_view(query),
            key=_heads_view(key),
            value=_heads_view(value),
            output=output.data_ptr(),
            sequences=sequences.data_ptr(),
            spans=spans.data_ptr(),
            num_sequences=len(sequences),
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_size=query.shape[3],
            scale=scaling,
            soft_cap=softcap or 0.0,
            window=window or 0,
            num_threads=torch.get_num_threads(),
        )
        self._call["attention"](args)


def _rows_of(states: torch.Tensor) -> dict[str, int]:
    width = states.shape[-1]
    return {"num_rows": states.numel() // width, "width": width, "num_threads": torch.get_num_threads()}


def _heads_view(states: torch.Tensor) -> abi.HeadsView:
    return abi.HeadsView(states.data_ptr(), states.stride(2), states.stride(1))
