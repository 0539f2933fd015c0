"""Conversion of PEFT adapters with a scalar head, or with a value head in a file of its own (LLaMA-Factory)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from export.conversion import Conversion
from export.conversion_options import ConversionOptions
from service.checkpoints.adapter import ADAPTER_WEIGHTS_FILE, merge_adapter
from service.checkpoints.files import ADAPTER_CONFIG_FILE
from service.checkpoints.reward_description import (
    ClassifierHead,
    Provenance,
    RewardDescription,
    read_description,
    write_description,
)
from service.checkpoints.weights import VALUE_HEAD_FILE
from service.errors import CheckpointError


def refuse_adapter(source: Path, options: ConversionOptions) -> None:
    """Refuse options that no adapter takes.

    Raises:
        CheckpointError: there are some.
    """
    if options.members or options.token_logits is not None or options.outputs:
        raise CheckpointError(
            f"{source} is an adapter, which is merged with its own head alone: convert it first, and then the result."
        )


def convert_adapter(source: Path, unfinished: Path, base: Path | None, *, drop_bias: bool) -> Conversion:
    """Merge an adapter and its head into its base, and return what was changed.

    Args:
        source: the adapter.
        unfinished: the folder that gets the result.
        base: the base; None: the one that the adapter names.
        drop_bias: accept that the bias of a value head is lost.

    Raises:
        CheckpointError: there is no base, or not one head; or its bias would be lost without ``drop_bias``.
    """
    if not (source / VALUE_HEAD_FILE).is_file():
        merge_adapter(source, unfinished, base)
        if read_description(unfinished) is None:
            write_description(unfinished, RewardDescription(ClassifierHead(), source=Provenance("PEFT")))
        return Conversion(str(source), "PEFT", (), 0.0, ())
    tensors = load_file(source / VALUE_HEAD_FILE)
    weights = [name for name in tensors if name.endswith("weight")]
    if len(weights) != 1:
        raise CheckpointError(
            f"{source / VALUE_HEAD_FILE} does not hold one head: exactly one tensor name must end in weight."
        )
    bias = tensors.get(weights[0].removesuffix("weight") + "bias")
    dropped = _dropped_bias(source, bias, drop_bias=drop_bias)
    with tempfile.TemporaryDirectory() as work_dir:
        merge_adapter(_put_head_into_adapter(source, Path(work_dir), tensors[weights[0]]), unfinished, base)
    write_description(
        unfinished, RewardDescription(ClassifierHead(), pooling="last", source=Provenance("LLaMA-Factory"))
    )
    return Conversion(str(source), "LLaMA-Factory", (weights[0],), dropped, ())


def _put_head_into_adapter(source: Path, work_dir: Path, head: Any) -> Path:
    """Write a copy of the adapter that holds the head as PEFT would have saved it with the task type SEQ_CLS."""
    shutil.copytree(source, work_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))
    config = json.loads((source / ADAPTER_CONFIG_FILE).read_bytes())
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (work_dir / ADAPTER_CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(source / ADAPTER_WEIGHTS_FILE) | {"base_model.model.score.weight": head}
    save_file(weights, work_dir / ADAPTER_WEIGHTS_FILE, {"format": "pt"})
    return work_dir


def _dropped_bias(source: Path, bias: Any | None, *, drop_bias: bool) -> float:
    constant = 0.0 if bias is None else float(bias.flatten()[0])
    if constant and not drop_bias:
        raise CheckpointError(
            f"The value head of {source} has a bias of {constant:.6g}, and transformers' classifier has none: "
            "pass --drop-bias if all rewards may shift by this constant (comparisons stay the same)."
        )
    return constant
