"""The head that a conversion writes: its tensors under the names of the result, and what ``reward_model.json`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.checkpoints.described_heads import DescribedHead, LayeredHead, LinearLayer
from service.checkpoints.reward_description import Combination
from service.records import Pooling

HEAD = "score"
"""The module of the result that holds a head."""

Tensors = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConvertedHead:
    """A head with the tensors that the result stores."""

    layout: str
    """Name of the layout that was recognised, or of the option that made the head."""

    head: DescribedHead
    """Its tensors have the names of the result."""

    tensors: Tensors = field(repr=False)
    """The stored tensors of the head, by their names in the result."""

    sources: tuple[str, ...]
    """Names of the tensors of the source that became the head."""

    outputs: tuple[str, ...] = ("reward",)
    combine: Combination | None = None
    """How several outputs become the reward; None: one output, or no rule."""

    pooling: Pooling = "last"

    text: str = ""
    """What the text of training looked like, where its tokenizer has no chat template."""

    notes: tuple[str, ...] = ()
    """Sentences for the report of the conversion."""

    @property
    def linear(self) -> LinearLayer | None:
        """The layer of a head that is one linear layer with one output; None for another head."""
        if not isinstance(self.head, LayeredHead) or len(self.head.layers) > 1 or self.head.softcap is not None:
            return None
        layer = self.head.layers[0]
        return layer if len(self.tensors[layer.weight]) == 1 else None


def stored_layers(
    layers: Sequence[LinearLayer], tensors: Tensors, module: str
) -> tuple[tuple[LinearLayer, ...], dict[str, Any]]:
    """Return layers under the names of a module of the result, and their tensors by these names.

    Every second name is left for the activation, as in a sequence of modules.

    Args:
        layers: with the names of the source.
        tensors: those of the source.
        module: name of the module in the result.
    """
    renamed: list[LinearLayer] = []
    found: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        weight = f"{module}.{2 * number}.weight"
        bias = None if layer.bias is None else f"{module}.{2 * number}.bias"
        renamed.append(LinearLayer(weight, bias, layer.activation))
        found[weight] = tensors[layer.weight]
        if layer.bias is not None and bias is not None:
            found[bias] = tensors[layer.bias]
    return tuple(renamed), found


def layered_head(layers: Sequence[LinearLayer], tensors: Tensors, **fields: Any) -> ConvertedHead:
    """Return a head of layers that are named as in the source.

    Args:
        layers: first to last.
        tensors: those of the source.
        fields: fields of ``ConvertedHead``: ``layout``, and others where they are not the default.
    """
    renamed, found = stored_layers(layers, tensors, HEAD)
    sources = tuple(name for layer in layers for name in layer.tensor_names())
    return ConvertedHead(head=LayeredHead(renamed), tensors=found, sources=sources, **fields)


def head_module(tensors: Tensors) -> Any:
    """Return a module whose parameters are the tensors, with their names below ``HEAD``."""
    from torch import nn

    root = nn.Module()
    for name, tensor in tensors.items():
        *modules, leaf = name.removeprefix(f"{HEAD}.").split(".")
        module = root
        for part in modules:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor.contiguous(), requires_grad=False))
    return root
