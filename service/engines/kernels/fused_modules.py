"""The forwards that take the place of a module's own: norms, rotations, gated layers, linear layers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from service.engines.kernels.bindings import STEP, Activation, Kernels, Norm, PackedGates, PackedWeight, RmsNorm
from service.engines.linear.batch_invariant import RowBlockedLinear
from service.engines.linear.int8 import Int8Linear

ROTATION = "apply_rotary_pos_emb"
"""What transformers' families call the function that turns queries and keys by their positions."""

PLAIN_LAYERS = (nn.Linear, RowBlockedLinear)
"""Other kinds of linear layers (quantized in other ways, sharded) are left alone."""

TRIAL_ROWS = 64

TRIAL_ERROR = 2**-6
"""How far a trial may be off, relative to its largest number: two of bfloat16's last places."""


class KernelForward(ABC):
    """What takes the place of a module's ``forward``.

    ``packed_layers``: whose weights it has packed for itself. ``parts``: modules within that it needs to run in a
    certain way, or that nobody calls any more (None).
    """

    packed_layers: tuple[nn.Linear, ...] = ()

    @property
    def parts(self) -> Mapping[nn.Module, KernelForward | None]:
        """See the class."""
        return dict.fromkeys(self.packed_layers)

    @abstractmethod
    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the module would."""


def forward_of(module: nn.Module, kernels: Kernels) -> KernelForward | None:
    """Return the kernels' way of computing a module; None where they have none that gives its numbers."""
    if type(module).__name__.endswith("RMSNorm"):
        return norm_of(module, kernels)
    if _plain_rotation(module) is not None:
        return _rotating_of(module, kernels)
    gates = gates_of(module)
    if gates is not None:
        return _gated_of(module, gates, kernels)
    if can_be_packed(module, kernels):
        return PackedLinear(module, kernels)  # type: ignore[arg-type]  # it is linear
    return None


# --- Norms -----------------------------------------------------------------------------------------------------------


class KernelNorm(KernelForward):
    """A root mean square norm."""

    def __init__(self, norm: RmsNorm, kernels: Kernels) -> None:
        self.norm = norm
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the normalised states [..., width]."""
        return self._kernels.rms_norm(states, self.norm)


def norm_of(module: Any, kernels: Kernels) -> KernelNorm | None:
    """Return a norm on the kernels; None where none of their kinds gives the module's numbers."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or not isinstance(epsilon, float):
        return None
    states = trial_states(weight.shape[-1])
    wanted = plain_forward(module)(states)
    for kind in Norm:
        forward = KernelNorm(RmsNorm(weight, epsilon, kind), kernels)
        # Where the kind rounds as the module does, but for the order of one sum all numbers are the same.
        if agree(forward(states), wanted) and (forward(states) == wanted).float().mean() > 0.99:
            return forward
    return None


# --- Rotations -------------------------------------------------------------------------------------------------------


class RotatingAttention(KernelForward):
    """An attention layer as transformers wrote it, but for the function with which it turns queries and keys."""

    def __init__(self, module: nn.Module, plain: FunctionType, kernels: Kernels) -> None:
        names = {**plain.__globals__, ROTATION: _rotation(plain.__globals__[ROTATION], kernels)}
        self._forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        self._forward.__kwdefaults__ = plain.__kwdefaults__
        self._module = module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the layer returns."""
        return self._forward(self._module, *inputs, **named)


def _rotation(plain: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """Return transformers' function for one packed row; it overwrites queries and keys, which nobody else reads."""

    def rotate(
        query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *others: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if others or named or len(cosines) > 1 or query.stride(3) != 1 or key.stride(3) != 1:
            turned: tuple[torch.Tensor, torch.Tensor] = plain(query, key, cosines, sines, *others, **named)
            return turned
        angles = cosines[0].to(query.dtype).contiguous(), sines[0].to(query.dtype).contiguous()
        kernels.rotate(query, *angles)
        kernels.rotate(key, *angles)
        return query, key

    return rotate


def _plain_rotation(module: nn.Module) -> FunctionType | None:
    """Return the forward of an attention layer that turns its queries and keys by the usual function, undecorated."""
    forward = inspect.unwrap(type(module).forward)
    if isinstance(forward, FunctionType) and ROTATION in forward.__code__.co_names:
        return forward if ROTATION in forward.__globals__ else None
    return None


def _rotating_of(module: nn.Module, kernels: Kernels) -> KernelForward | None:
    plain = _plain_rotation(module)
    head_size = getattr(module, "head_dim", None)
    if plain is None or plain is not type(module).forward or not isinstance(head_size, int):
        return None
    query, key = (trial_states(heads * head_size).view(1, -1, heads, head_size).transpose(1, 2) for heads in (4, 2))
    angles = trial_states(head_size // 2)
    cosines, sines = (torch.cat((turned, turned), dim=-1) for turned in (angles.cos(), angles.sin()))
    rotation = plain.__globals__[ROTATION]
    wanted = rotation(query, key, cosines, sines)
    found = _rotation(rotation, kernels)(query.clone(), key.clone(), cosines, sines)
    alike = all(agree(*both) for both in zip(found, wanted, strict=True))
    return RotatingAttention(module, plain, kernels) if alike else None


# --- Gated layers ----------------------------------------------------------------------------------------------------


class GatedLayer(KernelForward):
    """A gated feed-forward layer; its inner states stay in a core's cache."""

    def __init__(self, layers: tuple[nn.Linear, ...], activation: Activation, kernels: Kernels) -> None:
        self.packed_layers = layers
        self.gates = pack_gates(layers, activation, kernels)
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for states [..., width]."""
        return self._kernels.gated_layer(states, self.gates)


def pack_gates(layers: tuple[nn.Linear, ...], activation: Activation, kernels: Kernels) -> PackedGates:
    """Pack gate, up and down, or gate-and-up and down, whose gate comes first."""
    *opening, down = layers
    gate, up = opening[0].weight.chunk(2) if len(opening) == 1 else (layer.weight for layer in opening)
    return kernels.pack_gates(gate, up, down.weight, activation)


class OpenedGate(KernelForward):
    """A gated feed-forward layer whose products stay torch's."""

    def __init__(self, layers: tuple[nn.Linear, ...], activation: Activation, kernels: Kernels) -> None:
        self._layers = layers
        self._activation = activation
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> Any:
        """Return the layer's output for states [..., width]."""
        *opening, down = self._layers
        opened = [layer(states) for layer in opening]
        gate, up = opened if len(opened) == 2 else (part.contiguous() for part in opened[0].chunk(2, dim=-1))
        return down(self._kernels.open_gate(gate, up, self._activation))


def gates_of(module: Any) -> tuple[nn.Linear, ...] | None:
    """Return gate, up and down of a feed-forward layer, or gate-and-up and down, as the families name them."""
    for names in (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")):
        layers = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(layer, nn.Linear) for layer in layers):
            return layers  # type: ignore[return-value]  # all are linear
    return None


def _gated_of(module: Any, layers: tuple[nn.Linear, ...], kernels: Kernels) -> KernelForward | None:
    activation = activation_of(module)
    if activation is None:
        return None
    packed = all(can_be_packed(layer, kernels) and layer.bias is None for layer in layers)
    forward = (GatedLayer if packed else OpenedGate)(layers, activation, kernels)
    states = trial_states(layers[0].in_features)
    return forward if agree(forward(states), plain_forward(module)(states)) else None


def activation_of(module: Any) -> Activation | None:
    """Return what opens a feed-forward layer's gate; None where the kernels do not know it."""
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(function):
        return None
    numbers = torch.linspace(-8, 8, 257)
    opened = function(numbers.clone())
    for activation, wanted in (
        (Activation.SILU, nn.functional.silu(numbers)),
        (Activation.GELU_TANH, nn.functional.gelu(numbers, approximate="tanh")),
    ):
        if torch.allclose(opened, wanted, atol=1e-5):
            return activation
    return None


# --- Linear layers ---------------------------------------------------------------------------------------------------


class PackedLinear(KernelForward):
    """A linear layer with its weight packed ahead; a row's result does not depend on the number of rows."""

    def __init__(self, layer: nn.Linear, kernels: Kernels) -> None:
        self.packed_layers = (layer,)
        self._weight = pack_layer(layer, kernels)
        self._kernels = kernels

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] of states [..., width]."""
        return self._kernels.linear(states, self._weight)


def pack_layer(layer: nn.Linear, kernels: Kernels) -> PackedWeight:
    """Pack a linear layer's weight; its bias stays where it is."""
    bias: torch.Tensor | None = layer._parameters["bias"]  # noqa: SLF001 - torch's stubs deny that `bias` may be None
    return kernels.pack_weight(layer.weight, bias)


def can_be_packed(module: nn.Module, kernels: Kernels) -> bool:
    """Whether a module is a linear layer that the kernels multiply, as wide as they need it."""
    kinds = (Int8Linear,) if kernels.quantizes else PLAIN_LAYERS
    return isinstance(module, nn.Linear) and type(module) in kinds and module.in_features % STEP == 0


# --- Trials ----------------------------------------------------------------------------------------------------------


def plain_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    """Return a module's own forward, whatever was put in its place."""
    forward: Callable[..., torch.Tensor] = type(module).forward.__get__(module)
    return forward


def trial_states(width: int) -> torch.Tensor:
    """Return random bfloat16 states [1, rows, width], the same each time."""
    random = torch.Generator().manual_seed(width)
    return torch.randn(1, TRIAL_ROWS, width, generator=random).to(torch.bfloat16)


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results of a trial are the same but for rounding."""
    difference = (found.float() - wanted.float()).abs().max()
    return bool(difference <= TRIAL_ERROR * wanted.float().abs().max())
