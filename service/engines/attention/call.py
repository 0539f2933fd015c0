"""One call of attention, with the arguments that transformers' attention layers pass.

All attention functions of the packed path (torch, compiled blocks, the compiled CPU kernels) take an ``AttentionCall``;
``transformers_attention`` adapts them to the signature of ``transformers.AttentionInterface``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from service.engines.attention.layout import PackedLayout


class PackingUnsupportedError(RuntimeError):
    """The model requires something of attention that the packed path does not support."""


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention layer's call, for all sequences of a packed batch."""

    query: torch.Tensor
    """[1, heads, tokens, head dimension], tokens of the packed batch, padding included."""

    key: torch.Tensor
    """[1, key heads, tokens, head dimension]; each key head serves ``heads / key heads`` query heads."""

    value: torch.Tensor
    """[1, key heads, tokens, value dimension]."""

    packed_layout: PackedLayout | None
    """The layout of the packed batch; None: the model did not pass it on."""

    is_causal: bool
    """Whether a query attends only to itself and to earlier tokens."""

    scaling: float | None
    """Factor on the scores; None: one over the square root of the head dimension."""

    window: int | None
    """Tokens that a query attends to, itself included (sliding window); None: all before it."""

    softcap: float | None
    """Scores become ``softcap * tanh(score / softcap)``; None: they are not capped."""

    @property
    def layout(self) -> PackedLayout:
        """The layout of the packed batch.

        Raises:
            PackingUnsupportedError: the layer is not causal, or the model did not pass the layout on.
        """
        if self.packed_layout is None or not self.is_causal:
            raise PackingUnsupportedError("A layer is not causal, or the model does not pass on the packed layout")
        return self.packed_layout

    @property
    def scale(self) -> float:
        """The factor on the scores, resolved."""
        return self.query.shape[3] ** -0.5 if self.scaling is None else self.scaling


PackedAttention: TypeAlias = Callable[[AttentionCall], torch.Tensor]
"""Computes attention within each sequence of a packed batch; returns [1, tokens, heads, value dimension]."""


def transformers_attention(attend: PackedAttention) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return a function for ``AttentionInterface.register``: the attended values, and no attention weights."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        *,
        packed_layout: PackedLayout | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        return attend(AttentionCall(query, key, value, packed_layout, causal, scaling, sliding_window, softcap)), None

    return attention
