"""Ensembles: the heads of several checkpoints, or of a file, on one body.

All members read the same state of the same body, so an ensemble costs one pass. Bodies are compared tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from export.converted_head import HEAD, ConvertedHead, stored_layers
from service.checkpoints.described_heads import EnsembleHead, LayeredHead, LinearLayer
from service.checkpoints.reward_description import Combination
from service.checkpoints.weights import open_weights
from service.errors import CheckpointError


def heads_in_file(file: Path, hidden_size: int, like: ConvertedHead | None) -> list[ConvertedHead]:
    """Return the members of a safetensors file, one for each row of its matrices [K, hidden], in the order of names.

    A bias is a tensor of the same name, with ``bias`` in place of ``weight``.

    Args:
        file: a safetensors file.
        hidden_size: width of the states.
        like: whose pooling they have; None: transformers' own.

    Raises:
        CheckpointError: it holds something else.
    """
    with open_weights(file) as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
    members: list[ConvertedHead] = []
    used = set()
    for name in sorted(tensors):
        matrix = tensors[name]
        if matrix.ndim != 2 or matrix.shape[1] != hidden_size:
            continue
        bias_name = name.removesuffix("weight") + "bias" if name.endswith("weight") else ""
        bias = tensors.get(bias_name)
        used |= {name, bias_name}
        for index, row in enumerate(matrix):
            own = {f"{HEAD}.0.weight": row[None]}
            layer = LinearLayer(f"{HEAD}.0.weight", None if bias is None else f"{HEAD}.0.bias")
            if bias is not None:
                own[f"{HEAD}.0.bias"] = bias[index : index + 1]
            pooling = like.pooling if like is not None else "hf"
            members.append(ConvertedHead("heads", LayeredHead((layer,)), own, (f"{name}[{index}]",), pooling=pooling))
    unused = sorted(set(tensors) - used)
    if not members or unused:
        found = f"it also holds {unused[0]}" if members else "it holds no such matrix"
        raise CheckpointError(
            f"{file} is no file of heads, which are matrices of {hidden_size} columns and their biases: {found}."
        )
    return members


def ensemble_of(members: Sequence[ConvertedHead], combine: Combination) -> ConvertedHead:
    """Return one head with a number for each member.

    Members of one linear layer become one layer with a row for each, in fp32.

    Args:
        members: at least two, in order.
        combine: how their numbers become the reward.

    Raises:
        CheckpointError: they cannot share a text or a state.
    """
    first = members[0]
    for member in members:
        if not isinstance(member.head, LayeredHead) or len(member.outputs) > 1:
            raise CheckpointError(
                f"A member of the layout {member.layout} gives more than one reward: take scalar heads."
            )
        if (member.pooling, member.text) != (first.pooling, first.text):
            raise CheckpointError(
                "The members were trained with another pooling or text "
                f"({member.layout}: {member.pooling}; {first.layout}: {first.pooling}), so they cannot share a pass."
            )
    names = tuple(f"member_{number}" for number in range(len(members)))
    sources = tuple(name for member in members for name in member.sources)
    together = replace(first, layout="ensemble", sources=sources, outputs=names, combine=combine)
    layers = [member.linear for member in members]
    if all(layer is not None for layer in layers):
        return _stacked(together, members, [layer for layer in layers if layer is not None])
    heads: list[LayeredHead] = []
    tensors: dict[str, Any] = {}
    for number, member in enumerate(members):
        renamed, own = stored_layers(member.head.layers, member.tensors, f"{HEAD}.members.{number}")  # type: ignore[union-attr]
        heads.append(LayeredHead(renamed))
        tensors |= own
    return replace(together, head=EnsembleHead(tuple(heads)), tensors=tensors)


def _stacked(together: ConvertedHead, members: Sequence[ConvertedHead], layers: Sequence[LinearLayer]) -> ConvertedHead:
    weights = [member.tensors[layer.weight].float() for member, layer in zip(members, layers, strict=True)]
    tensors = {f"{HEAD}.0.weight": torch.cat(weights)}
    has_bias = any(layer.bias is not None for layer in layers)
    if has_bias:
        tensors[f"{HEAD}.0.bias"] = torch.cat(
            [
                torch.zeros(1) if layer.bias is None else member.tensors[layer.bias].float().flatten()
                for member, layer in zip(members, layers, strict=True)
            ]
        )
    layer = LinearLayer(f"{HEAD}.0.weight", f"{HEAD}.0.bias" if has_bias else None)
    return replace(together, head=LayeredHead((layer,)), tensors=tensors)


def require_equal_bodies(first: Any, second: Any, prefix: str) -> None:
    """Check that two stored models have the same body, number by number.

    Args:
        first: a ``StoredModel``.
        second: another one.
        prefix: what the names of the body's tensors begin with.

    Raises:
        CheckpointError: they differ; names the first tensor that does.
    """
    names = {name for stored in (first, second) for name in stored.tensors if name.startswith(prefix)}
    for name in sorted(names):
        one, other = first.tensors.get(name), second.tensors.get(name)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype or not one.equal(other):
            raise CheckpointError(
                f"{second.source} has another body than {first.source} ({name} differs), so the two cannot share a "
                "pass: members of an ensemble are heads on one body."
            )
