"""Decoder blocks compiled by ``torch.compile``, which fuses the operations between matrix products and attention.

It compiles transformers' own code of the norms, rotary embeddings, gates and residuals. Batch-invariant matrix products
and attention within a packed batch are custom operators, which the compiler calls without tracing into them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
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
"""The name of this attention and its mask function in transformers."""

_layout: ContextVar[PackedLayout | None] = ContextVar("_layout", default=None)
"""The layout of the running pass. A custom operator takes tensors and numbers only, so it reads the layout here."""


@cache
def register_compiled_attention() -> str:
    """Register attention for compiled blocks with transformers, once in a process; return its name."""
    AttentionInterface.register(COMPILED_ATTENTION, compiled_attention)
    AttentionMaskInterface.register(COMPILED_ATTENTION, no_mask)
    return COMPILED_ATTENTION


def check_compiler(device: torch.device) -> None:
    """Check that blocks can be compiled for the device; the compiler for CUDA is part of torch.

    Raises:
        SettingsError: no C++ compiler is installed.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise SettingsError(
            f"model.compile needs a C++ compiler, and {compiler} is not installed: install g++, or omit the setting"
        )


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile every block of a decoder, for packed batches of any length; equal blocks share the compiled code.

    The first pass takes some seconds to half a minute. Hooks on a block are not compiled and still run.
    """
    for block in blocks:
        block.forward = CompiledBlock(block.forward)


def restore_blocks(body: nn.Module) -> None:
    """Restore the original forward of every compiled block."""
    for module in body.modules():
        if isinstance(vars(module).get("forward"), CompiledBlock):
            del module.forward


class CompiledBlock:
    """Replaces a block's forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._compiled = torch.compile(forward, dynamic=True, fullgraph=True)

    def __call__(self, *inputs: Any, packed_layout: PackedLayout | None = None, **named: Any) -> Any:
        """Return what the block returns; the layout is passed to attention outside of the compiled code."""
        with _running_with(packed_layout):
            return self._compiled(*inputs, **named)


@contextmanager
def _running_with(layout: PackedLayout | None) -> Iterator[None]:
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@torch.library.custom_op("reward_service::packed_attention", mutates_args=())
def _attention_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    return attend(AttentionCall(query, key, value, _layout.get(), is_causal, scaling, window, softcap))


@_attention_operator.register_fake
def _output_shape(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


@transformers_attention
def compiled_attention(call: AttentionCall) -> torch.Tensor:
    """Compute attention within a compiled block, whose layout is not an argument of the call."""
    attended: torch.Tensor = _attention_operator(
        call.query, call.key, call.value, call.is_causal, call.scaling, call.window, call.softcap
    )
    return attended
