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

from service.engines.attention.call import AttentionCall, transformers_attention
from service.engines.attention.interface import ATTENTION, attend, no_mask
from service.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.engines.attention.layout import PackedLayout

COMPILED_ATTENTION = f"{ATTENTION}_compiled"
"""The name under which transformers knows our attention within compiled blocks."""

_row: ContextVar[PackedLayout | None] = ContextVar("_row", default=None)
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

    def __call__(self, *inputs: Any, packed_layout: PackedLayout | None = None, **named: Any) -> Any:
        """Return what the block returns, with the row's layout laid aside for attention."""
        with _passing(packed_layout):
            return self._compiled(*inputs, **named)


@contextmanager
def _passing(packed_layout: PackedLayout | None) -> Iterator[None]:
    token = _row.set(packed_layout)
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
    return attend(AttentionCall(query, key, value, _row.get(), is_causal, scaling, window, softcap))


@_attend.register_fake
def _shape_of_attended(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


@transformers_attention
def compiled_attention(call: AttentionCall) -> torch.Tensor:
    """Compute attention within a compiled block, whose layout is not an argument of the call."""
    attended: torch.Tensor = _attend(
        call.query, call.key, call.value, call.is_causal, call.scaling, call.window, call.softcap
    )
    return attended


AttentionInterface.register(COMPILED_ATTENTION, compiled_attention)
AttentionMaskInterface.register(COMPILED_ATTENTION, no_mask)
