"""Kernel forwards for single modules: norms, rotary attention layers, gated feed-forward layers, linear layers.

Each kind is recognized by its computation, not by its model family: a candidate runs on random states, and is used only
if its results agree with the module's own.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from service.engines.kernels.bindings import STEP, Activation, Kernels, Norm, PackedGatedMlp, PackedWeight, RmsNorm
from service.engines.linear.batch_invariant import BatchInvariantLinear
from service.engines.linear.int8 import Int8Linear
from service.engines.linear.verified_blocks import VerifiedLinear

ROPE_FUNCTION = "apply_rotary_pos_emb"
"""The name of the function that rotates queries and keys, in transformers' model families."""

UNQUANTIZED_LAYERS = (nn.Linear, BatchInvariantLinear, VerifiedLinear)
"""The linear layers that kernels without int8 replace; others (quantized otherwise, sharded) are not changed."""

TRIAL_ROWS = 64

TRIAL_TOLERANCES = {torch.bfloat16: 2**-6, torch.float32: 2**-16}
"""Largest accepted difference in a trial, relative to the largest magnitude: two units of bfloat16's last place, and in
fp32 what another order of some thousand additions explains."""

INT8_TRIAL_TOLERANCE = 2**-4
"""The same for products in int8: where states differ by a unit of bfloat16's last place, some round to the next
integer, which is up to 1/127 of the largest in their group. 64 rows through the demo model's blocks differ by up to
1.4 times 2**-6."""

TRIAL_EQUAL_SHARE = 0.99
"""Least share of equal elements in the trial of a norm in bfloat16: it shows where the norm rounds."""


class KernelForward(ABC):
    """What replaces a module's ``forward``."""

    packed_layers: tuple[nn.Linear, ...] = ()
    """The layers whose weights this forward has packed."""

    @property
    def replacements(self) -> Mapping[nn.Module, KernelForward | None]:
        """The submodules that this forward controls: their new forward, or None where they are no longer called."""
        return dict.fromkeys(self.packed_layers)

    @abstractmethod
    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the module would return."""


def match_module(module: nn.Module, kernels: Kernels) -> KernelForward | None:
    """Return a kernel forward for a module; None where no kernel computes the same."""
    if type(module).__name__.endswith("RMSNorm"):
        return match_norm(module, kernels)
    if _rope_forward(module) is not None:
        return _match_rope_attention(module, kernels)
    layers = gated_mlp_layers(module)
    if layers is not None:
        return _match_gated_mlp(module, layers, kernels)
    if can_pack(module, kernels):
        return PackedLinear(module, kernels)  # type: ignore[arg-type]  # can_pack: it is linear
    return None


# --- Norms -----------------------------------------------------------------------------------------------------------


class FusedRmsNorm(KernelForward):
    """A root mean square norm."""

    def __init__(self, norm: RmsNorm, kernels: Kernels) -> None:
        self.norm = norm
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the norm of states [..., width]."""
        return self._kernels.rms_norm(states, self.norm)


def match_norm(module: Any, kernels: Kernels) -> FusedRmsNorm | None:
    """Return a kernel forward for a norm; None where none of the kinds gives the module's results."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or not isinstance(epsilon, float):
        return None
    if weight.dtype != kernels.dtype:
        return None
    states = trial_states(weight.shape[-1], kernels.dtype)
    expected = original_forward(module)(states)
    for kind in Norm:
        forward = FusedRmsNorm(RmsNorm(weight, epsilon, kind), kernels)
        if results_agree(forward(states), expected) and _rounds_alike(forward(states), expected):
            return forward
    return None


def _rounds_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether nearly all elements are equal: with the module's rounding only the order of one sum differs.

    In fp32 the kinds round alike, and that order changes the last bit of many elements.
    """
    return found.dtype == torch.float32 or bool((found == expected).float().mean() > TRIAL_EQUAL_SHARE)


# --- Rotary position embeddings --------------------------------------------------------------------------------------


class RopeAttention(KernelForward):
    """The attention layer of transformers, with another function that rotates queries and keys."""

    def __init__(self, module: nn.Module, original: FunctionType, kernels: Kernels) -> None:
        names = {**original.__globals__, ROPE_FUNCTION: _rope_function(original.__globals__[ROPE_FUNCTION], kernels)}
        self._forward = FunctionType(
            original.__code__, names, original.__name__, original.__defaults__, original.__closure__
        )
        self._forward.__kwdefaults__ = original.__kwdefaults__
        self._module = module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the layer returns."""
        return self._forward(self._module, *inputs, **named)


def _rope_function(original: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """Return transformers' function for one packed batch; it overwrites queries and keys, which nothing else reads."""

    def apply_rope(
        query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *others: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if others or named or len(cosines) > 1 or query.stride(3) != 1 or key.stride(3) != 1:
            rotated: tuple[torch.Tensor, torch.Tensor] = original(query, key, cosines, sines, *others, **named)
            return rotated
        angles = cosines[0].to(query.dtype).contiguous(), sines[0].to(query.dtype).contiguous()
        kernels.apply_rope(query, *angles)
        kernels.apply_rope(key, *angles)
        return query, key

    return apply_rope


def _rope_forward(module: nn.Module) -> FunctionType | None:
    """Return the undecorated forward of an attention layer that calls ``ROPE_FUNCTION``; None for other modules."""
    forward = inspect.unwrap(type(module).forward)
    if isinstance(forward, FunctionType) and ROPE_FUNCTION in forward.__code__.co_names:
        return forward if ROPE_FUNCTION in forward.__globals__ else None
    return None


def _match_rope_attention(module: nn.Module, kernels: Kernels) -> KernelForward | None:
    original = _rope_forward(module)
    head_size = getattr(module, "head_dim", None)
    if original is None or original is not type(module).forward or not isinstance(head_size, int):
        return None
    query, key = (
        trial_states(heads * head_size, kernels.dtype).view(1, -1, heads, head_size).transpose(1, 2) for heads in (4, 2)
    )
    angles = trial_states(head_size // 2, kernels.dtype)
    cosines, sines = (torch.cat((half, half), dim=-1) for half in (angles.cos(), angles.sin()))
    rope = original.__globals__[ROPE_FUNCTION]
    expected = rope(query, key, cosines, sines)
    found = _rope_function(rope, kernels)(query.clone(), key.clone(), cosines, sines)
    agrees = all(results_agree(*pair) for pair in zip(found, expected, strict=True))
    return RopeAttention(module, original, kernels) if agrees else None


# --- Gated feed-forward layers ---------------------------------------------------------------------------------------


class FusedGatedMlp(KernelForward):
    """A gated feed-forward layer in one kernel, whose intermediate states stay in a core's cache."""

    def __init__(self, layers: tuple[nn.Linear, ...], activation: Activation, kernels: Kernels) -> None:
        self.packed_layers = layers
        self._mlp = pack_gated_mlp(layers, activation, kernels)
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for states [..., width]."""
        return self._kernels.gated_mlp(states, self._mlp)


def pack_gated_mlp(layers: tuple[nn.Linear, ...], activation: Activation, kernels: Kernels) -> PackedGatedMlp:
    """Pack the weights of (gate, up, down), or of (gate and up in one, down), where the gate's outputs come first."""
    *inputs, down = layers
    gate, up = inputs[0].weight.chunk(2) if len(inputs) == 1 else (layer.weight for layer in inputs)
    return kernels.pack_gated_mlp(gate, up, down.weight, activation)


class FusedActAndMul(KernelForward):
    """A gated feed-forward layer whose products are torch's; activation and multiplication are one kernel."""

    def __init__(self, layers: tuple[nn.Linear, ...], activation: Activation, kernels: Kernels) -> None:
        self._layers = layers
        self._activation = activation
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> Any:
        """Return the layer's output for states [..., width]."""
        *inputs, down = self._layers
        products = [layer(states) for layer in inputs]
        gate, up = products if len(products) == 2 else (part.contiguous() for part in products[0].chunk(2, dim=-1))
        return down(self._kernels.act_and_mul(gate, up, self._activation))


def gated_mlp_layers(module: Any) -> tuple[nn.Linear, ...] | None:
    """Return (gate, up, down) or (gate and up in one, down) of a feed-forward layer, by the names that families use."""
    for names in (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")):
        layers = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(layer, nn.Linear) for layer in layers):
            return layers  # type: ignore[return-value]  # all are linear
    return None


def _match_gated_mlp(module: Any, layers: tuple[nn.Linear, ...], kernels: Kernels) -> KernelForward | None:
    activation = match_activation(module)
    if activation is None:
        return None
    packs = all(can_pack(layer, kernels) and layer.bias is None for layer in layers)
    forward = (FusedGatedMlp if packs else FusedActAndMul)(layers, activation, kernels)
    states = trial_states(layers[0].in_features, kernels.dtype)
    expected = original_forward(module)(states)
    return forward if results_agree(forward(states), expected, is_int8=kernels.is_int8) else None


def match_activation(module: Any) -> Activation | None:
    """Return the activation of a feed-forward layer's gate; None where the kernels do not have it."""
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(function):
        return None
    inputs = torch.linspace(-8, 8, 257)
    outputs = function(inputs.clone())  # a copy, because it may work in place
    for activation, expected in (
        (Activation.SILU, nn.functional.silu(inputs)),
        (Activation.GELU_TANH, nn.functional.gelu(inputs, approximate="tanh")),
    ):
        if torch.allclose(outputs, expected, atol=1e-5):
            return activation
    return None


# --- Linear layers ---------------------------------------------------------------------------------------------------


class PackedLinear(KernelForward):
    """A linear layer with a packed weight; the result for a row does not depend on the number of rows."""

    def __init__(self, layer: nn.Linear, kernels: Kernels) -> None:
        self.packed_layers = (layer,)
        self._weight = pack_linear(layer, kernels)
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] for states [..., width]."""
        return self._kernels.linear(states, self._weight)


def pack_linear(layer: nn.Linear, kernels: Kernels) -> PackedWeight:
    """Pack a linear layer's weight; its bias is not copied."""
    bias: torch.Tensor | None = layer._parameters["bias"]  # noqa: SLF001 - torch's stubs deny that `bias` may be None
    return kernels.pack_weight(layer.weight, bias)


def can_pack(module: nn.Module, kernels: Kernels) -> bool:
    """Whether a module is a linear layer of a class, dtype and width that these kernels support."""
    classes = (Int8Linear,) if kernels.is_int8 else UNQUANTIZED_LAYERS
    if not isinstance(module, nn.Linear) or type(module) not in classes:
        return False
    return module.weight.dtype == kernels.dtype and module.in_features % STEP == 0


# --- Trials ----------------------------------------------------------------------------------------------------------


def original_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    """Return the forward of a module's class, ignoring a replacement on the instance."""
    forward: Callable[..., torch.Tensor] = type(module).forward.__get__(module)
    return forward


def trial_states(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random states [1, TRIAL_ROWS, width], the same in each call."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(1, TRIAL_ROWS, width, generator=generator).to(dtype)


def results_agree(found: torch.Tensor, expected: torch.Tensor, *, is_int8: bool = False) -> bool:
    """Whether two results of a trial differ by no more than rounding; ``is_int8``: of products in int8."""
    tolerance = INT8_TRIAL_TOLERANCE if is_int8 else TRIAL_TOLERANCES[expected.dtype]
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().abs().max())
