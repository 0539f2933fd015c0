"""Fused decoder blocks: one kernel before and one after attention, each on blocks of rows that stay in a core's cache.

They replace pre-norm blocks, which add attention and a gated feed-forward layer, each of a norm of the states, to the
residual stream (Llama and similar families). A trial on random states determines whether a block is one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from service.engines.kernels.bindings import Kernels, PackedGatedMlp, RmsNorm
from service.engines.kernels.fused_modules import (
    KernelForward,
    can_pack,
    gated_mlp_layers,
    match_activation,
    match_norm,
    original_forward,
    pack_gated_mlp,
    pack_linear,
    results_agree,
    trial_states,
)

if TYPE_CHECKING:
    from service.engines.attention.layout import PackedLayout

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
"""The names of the query, key and value projections in transformers' model families."""


class FusedDecoderBlock(KernelForward):
    """A decoder block in three steps: ``norm_qkv``, transformers' own attention layer, ``attn_out_mlp``.

    The attention layer still calls all of its linear layers, but they compute nothing. Query, key and value projections
    return what ``norm_qkv`` has computed before. The output projection returns its input, which ``attn_out_mlp``
    multiplies by the weight afterwards. The block's norms and feed-forward layer are not called any more.

    The states of the input are overwritten: in a model they are read by this block alone.

    After the last block, few states are read: those of the tokens that the head reads. It computes keys and values of
    all tokens, and all else for these tokens alone (``PackedLayout.read_tokens``); the states of the others are then
    those of its input.
    """

    def __init__(
        self,
        module: Any,
        norms: tuple[RmsNorm, RmsNorm],
        projections: tuple[nn.Linear, ...],
        mlp: tuple[tuple[nn.Linear, ...], PackedGatedMlp],
        kernels: Kernels,
    ) -> None:
        attn_out = module.self_attn.o_proj
        mlp_layers, self._mlp = mlp
        self._module = module
        self._kernels = kernels
        self._is_last = _is_last_block(module)
        self._qkv_norm, self._mlp_norm = norms
        self._qkv_weights = [pack_linear(layer, kernels) for layer in projections]
        self._attn_out = pack_linear(attn_out, kernels)
        self._results = [_PrecomputedProjection() for _ in projections]
        self.packed_layers = (*projections, attn_out, *mlp_layers)
        unused = (module.input_layernorm, module.post_attention_layernorm, module.mlp)
        self._replacements: dict[nn.Module, KernelForward | None] = {
            **dict(zip(projections, self._results, strict=True)),
            attn_out: _Identity(),
            **dict.fromkeys(unused),
        }

    @property
    def replacements(self) -> Mapping[nn.Module, KernelForward | None]:
        """The forwards of the attention layer's linear layers; None for the norms and the feed-forward layer."""
        return self._replacements

    def __call__(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        """Return the block's states [1, tokens, width]."""
        states = hidden_states.contiguous()
        layout = named.get("packed_layout")
        if self._is_last and layout is not None and layout.read_tokens is not None:
            return self._run_last(states, layout, named)
        products = self._kernels.norm_qkv(states, self._qkv_norm, self._qkv_weights)
        attended = self._attend(states, products, named)
        self._kernels.attn_out_mlp(states, attended, self._attn_out, self._mlp_norm, self._mlp)
        return states

    def _run_last(self, states: torch.Tensor, layout: PackedLayout, named: dict[str, Any]) -> torch.Tensor:
        """Overwrite the states of the tokens that are read by those after the block; return all."""
        read = torch.tensor(layout.read_tokens)
        rows = states.index_select(1, read)
        products = self._norm_qkv_of_read(states, rows, read)
        attended = self._attend(states, products, {**named, "packed_layout": layout.of_read_tokens()})
        attended = attended.index_select(1, read)
        self._kernels.attn_out_mlp(rows, attended, self._attn_out, self._mlp_norm, self._mlp)
        return states.index_copy_(1, read, rows)

    def _norm_qkv_of_read(self, states: torch.Tensor, rows: torch.Tensor, read: torch.Tensor) -> list[torch.Tensor]:
        """Return the projections of all tokens, but zeros as queries of tokens that are not read.

        A projection of queries, keys and values in one is computed for all tokens.
        """
        if len(self._qkv_weights) == 1:
            return self._kernels.norm_qkv(states, self._qkv_norm, self._qkv_weights)
        query_weight, *others = self._qkv_weights
        (queries,) = self._kernels.norm_qkv(rows, self._qkv_norm, [query_weight])
        query = queries.new_zeros((*states.shape[:-1], query_weight.outputs)).index_copy_(1, read, queries)
        return [query, *self._kernels.norm_qkv(states, self._qkv_norm, others)]

    def _attend(self, states: torch.Tensor, products: list[torch.Tensor], named: dict[str, Any]) -> torch.Tensor:
        """Return what transformers' attention layer passes to its output projection."""
        for result, product in zip(self._results, products, strict=True):
            result.product = product
        attended: torch.Tensor = self._module.self_attn(hidden_states=states, **named)[0]
        return attended


class _PrecomputedProjection(KernelForward):
    """Replaces a query, key or value projection: returns the product that the block has computed for this pass."""

    product: torch.Tensor | None = None

    def __call__(self, _states: torch.Tensor) -> torch.Tensor:
        """Return the product [..., outputs], once: a stored reference would keep its memory allocated."""
        product, self.product = self.product, None
        if product is None:
            raise RuntimeError("An attention layer called a projection twice, or outside of its fused block")
        return product


class _Identity(KernelForward):
    """Replaces the output projection, which ``attn_out_mlp`` computes after the attention layer."""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states."""
        return states


def match_block(module: Any, kernels: Kernels) -> FusedDecoderBlock | None:
    """Return a fused forward for a decoder block; None where the module is no such block."""
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "hidden_size")
    if not all(hasattr(module, name) for name in names):
        return None
    projections = _projections_of(module.self_attn)
    norms = [match_norm(norm, kernels) for norm in (module.input_layernorm, module.post_attention_layernorm)]
    mlp_layers, activation = gated_mlp_layers(module.mlp), match_activation(module.mlp)
    if projections is None or norms[0] is None or norms[1] is None or mlp_layers is None or activation is None:
        return None
    if not all(can_pack(layer, kernels) for layer in (*projections, module.self_attn.o_proj, *mlp_layers)):
        return None
    if any(layer.bias is not None for layer in mlp_layers):
        return None
    mlp = mlp_layers, pack_gated_mlp(mlp_layers, activation, kernels)
    block = FusedDecoderBlock(module, (norms[0].norm, norms[1].norm), projections, mlp, kernels)
    return block if _agrees_in_trial(block, module, projections[0], kernels) else None


def _is_last_block(module: Any) -> bool:
    """Whether a block is the model's last one, after which only states that the head reads are needed."""
    attention = module.self_attn
    index, config = getattr(attention, "layer_idx", None), getattr(attention, "config", None)
    return index is not None and index + 1 == getattr(config, "num_hidden_layers", None)


def _projections_of(attention: Any) -> tuple[nn.Linear, ...] | None:
    for names in PROJECTIONS:
        layers = tuple(getattr(attention, name, None) for name in names)
        if all(isinstance(layer, nn.Linear) for layer in (*layers, getattr(attention, "o_proj", None))):
            return layers  # type: ignore[return-value]  # all are linear
    return None


def _agrees_in_trial(block: FusedDecoderBlock, module: Any, query_layer: nn.Linear, kernels: Kernels) -> bool:
    """Run block and module with a stand-in for the attention layer that passes the query projection on."""
    states = trial_states(module.hidden_size, kernels.dtype)
    attn_out, width = module.self_attn.o_proj, module.self_attn.o_proj.in_features
    with _temporary_forward(
        module.self_attn, lambda hidden_states, **_: (attn_out(query_layer(hidden_states)[..., :width]), None)
    ):
        expected = original_forward(module)(states)
    query = block.replacements[query_layer]
    with _temporary_forward(module.self_attn, lambda hidden_states, **_: (query(hidden_states)[..., :width], None)):  # type: ignore[misc]
        return results_agree(block(states.clone()), expected, is_int8=kernels.is_int8)


@contextmanager
def _temporary_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # an instance attribute hides the method of the class
    try:
        yield
    finally:
        del module.forward
