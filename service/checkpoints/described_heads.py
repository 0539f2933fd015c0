"""The kinds of head that ``reward_model.json`` can describe: which stored tensors they are, and how numbers are made.

Records only: `service.engines.model.described_head` computes them, `service.checkpoints.validation` compares them with
the stored tensors.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from service.records import Activation


class LinearLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear layer of a head, and the activation after it."""

    weight: str
    """Name of the stored tensor, of shape [outputs, inputs]."""

    bias: str | None = None
    """Name of the stored tensor, of shape [outputs]; None: the layer has no bias."""

    activation: Activation = "none"

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of its stored tensors."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class ClassifierHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="classifier"):
    """The head of transformers' classifier of the architecture; it gives ``num_labels`` logits."""


class LayeredHead(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="kind", tag="layers"
):
    """Linear layers with activations between them, on the state of the pooled token."""

    layers: tuple[LinearLayer, ...]
    """First to last; the last one gives the outputs."""

    softcap: float | None = None
    """The outputs x of the last layer become ``softcap * tanh(x / softcap)``, as Gemma does to the logits of its
    language model; None: they are not changed."""

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of all its stored tensors, in the order of the layers."""
        return tuple(name for layer in self.layers for name in layer.tensor_names())


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network that weights objectives by a state of the text (ArmoRM, arXiv:2406.12845)."""

    layers: tuple[LinearLayer, ...]
    """First to last; the last one gives one number per objective."""

    normalization: Literal["softmax", "none"] = "softmax"
    """What makes weights of those numbers."""

    temperature: float = 1.0
    """The numbers are divided by it before the normalization."""

    scale: float = 1.0
    """The weights are multiplied by it."""

    token_pattern: tuple[int, ...] = ()
    """Token ids between prompt and completion, as the chat template writes them: the gate reads the state of the first
    token of their last occurrence. Empty: it reads the pooled token."""


class GatedHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="gated"):
    """A linear layer that gives K objectives, and a gate that weights them by the prompt.

    The outputs are the gated sum ``gate @ (objectives @ transform)`` and then the objectives.
    """

    objectives: LinearLayer
    """From the state of the pooled token to K numbers, without an activation."""

    gate: Gate

    transform: str | None = None
    """Name of the stored tensor [K, K] that decorrelates the objectives before they are weighted; None: they are
    weighted as they are."""

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of all its stored tensors."""
        gate = tuple(name for layer in self.gate.layers for name in layer.tensor_names())
        return (*self.objectives.tensor_names(), *((self.transform,) if self.transform else ()), *gate)


class EnsembleHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="ensemble"):
    """Several heads on the same state, each of which gives one number."""

    members: tuple[LayeredHead, ...]

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of all its stored tensors, member by member."""
        return tuple(name for member in self.members for name in member.tensor_names())


DescribedHead: TypeAlias = LayeredHead | GatedHead | EnsembleHead
"""A head on states of single tokens that takes the place of the classifier's."""

Head: TypeAlias = ClassifierHead | DescribedHead
