"""The dtype that the service would choose on this machine, for measurements with ``--dtype auto``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def served_dtype(choice: str, model: Path | None, device: torch.device, *, int8: bool = False) -> str:
    """Return the dtype of a choice; ``auto`` is the service's own.

    Args:
        choice: one of ``DTYPES``.
        model: the checkpoint folder; None: a random model, as published ones are stored in bfloat16.
        device: the device of the forward pass.
        int8: whether linear layers in int8 are measured too, whose states are bfloat16.
    """
    import torch
    from transformers import AutoConfig

    from service.engines.devices.device import has_native_bfloat16, resolve_dtype
    from service.engines.model.classifier import stored_dtype

    if int8 and choice == "auto":
        return "bfloat16"
    stored = torch.bfloat16 if model is None else stored_dtype(AutoConfig.from_pretrained(model))
    dtype = resolve_dtype(choice, stored, device, native_bfloat16=has_native_bfloat16())
    return str(dtype).removeprefix("torch.")
