"""A model's blocks compiled: all between matrix products and attention becomes a few kernels of one reading each.

``torch.compile`` fuses norms, rotation, gates and residuals of transformers' own code. Matrix products in row blocks
and attention within a packed row stay ours, as operators that it calls and does not look into.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from service.engines.attention.interface import ATTENTION, attend, is_causal_layer, no_mask
from service.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.engines.attention.layout import Packing

COMPILED_ATTENTION = f"{ATTENTION}_compiled"
"""The name under which transformers knows our attention within compiled blocks."""

_row: ContextVar[Packing | None] = ContextVar("_row", default=None)
"""The layout of the row that passes through; an operator takes tensors and numbers only."""


def check_compiler(device: torch.device) -> None:
    """Say nothing where blocks can be compiled for the device; CUDA kernels bring their own compiler.

    Raises:
        SettingsError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise SettingsError(
            f"model.compile needs a C++ compiler, and {compiler} is not there: install g++, or leave the setting out"
        )


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Let every block of a decoder run compiled; they share their kernels, for rows of any length.

    The first pass takes some seconds to half a minute. Hooks on a block stay outside.
    """
    for block in blocks:
        block.forward = CompiledBlock(block.forward)


def restore_blocks(body: nn.Module) -> None:
    """Let every block run as transformers wrote it again."""
    for module in body.modules():
        if isinstance(vars(module).get("forward"), CompiledBlock):
            del module.forward


class CompiledBlock:
    """Takes the place of a block's forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._compiled = torch.compile(forward, dynamic=True, fullgraph=True)

    def __call__(self, *inputs: Any, packing: Packing | None = None, **named: Any) -> Any:
        """Return what the block returns, with the row's layout laid aside for attention."""
        with _passing(packing):
            return self._compiled(*inputs, **named)


@contextmanager
def _passing(packing: Packing | None) -> Iterator[None]:
    token = _row.set(packing)
    try:
        yield
    finally:
        _row.reset(token)


@torch.library.custom_op("reward_service::attend", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    return attend(query, key, value, _row.get(), is_causal=is_causal, scaling=scaling, window=window, softcap=softcap)


@_attend.register_fake
def _shape_of_attended(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def compiled_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Do what ``attention.packed_attention`` does, within a compiled block; the same shapes."""
    causal = is_causal_layer(module, is_causal)
    return _attend(query, key, value, causal, scaling, sliding_window, softcap), None


AttentionInterface.register(COMPILED_ATTENTION, compiled_attention)
AttentionMaskInterface.register(COMPILED_ATTENTION, no_mask)
