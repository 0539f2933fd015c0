"""Merges a PEFT adapter with a scalar head into its base model, which gives an ordinary checkpoint folder.

The engine serves plain checkpoints only. With one merge before serving, the forward pass has no adapters, and the model
that is validated, hashed and checked for parity is the model that is served.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_client.provenance import TRAINING_MANIFEST_FILE
from safetensors import SafetensorError, safe_open

from service.checkpoints.bounds import check_configuration, check_headers
from service.checkpoints.configuration import read_json
from service.checkpoints.demo_base import DEMO_BASE, obtain_demo_base
from service.checkpoints.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, TOKENIZER_CONFIG_FILE
from service.checkpoints.hub import local_folder
from service.checkpoints.quantization_format import refuse_quantized
from service.checkpoints.reward_description import DESCRIPTION_FILE, read_description, refuse_described_head
from service.errors import CheckpointError
from service.transformers_logging import transformers_silenced

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
"""Prefix of the base's parameter names in the adapter's file."""

PROMPT_LEARNING = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}
)
"""PEFT's types of adapters that add inputs instead of changing weights."""

HEAD_NAMES = ("score", "classifier")
"""Names of a sequence classifier's head in transformers and PEFT."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole checkpoint."""
    return (folder / ADAPTER_CONFIG_FILE).is_file()


def merge_adapter(adapter_dir: Path, out_dir: Path, base_dir: Path | None = None) -> Path:
    """Merge a PEFT adapter into its base, write the plain scalar-head checkpoint to ``out_dir`` and return it.

    W' = W + scale * B A for each adapted weight (Hu et al. 2021, equation 3; PEFT's own code does it, so its variants
    of LoRA work too), computed in fp32 and stored in the base's dtype. The head is the adapter's, stored in fp32 as it
    will be served. The tokenizer is the adapter's if it has one, else the base's. The training manifest and
    ``reward_model.json`` are copied, so that the merged model still names its base and its pooling.

    Args:
        adapter_dir: ``adapter_config.json`` and ``adapter_model.safetensors``.
        out_dir: created if it does not exist.
        base_dir: the base's checkpoint folder. When None, the adapter's configuration names the base: a local folder,
            the base of the demo model, or a hub id.

    Raises:
        CheckpointError: the adapter is incomplete, pickled or without a scalar head, or its base cannot be found or
            does not match. The message names the remedy.
    """
    config = _read_config(adapter_dir)
    _refuse_unmergeable(config, adapter_dir)
    shapes = _tensor_shapes(adapter_dir)
    outputs = _output_names(adapter_dir)
    _validate_head(shapes, adapter_dir, len(outputs))
    base = _locate_base(config, base_dir)
    with transformers_silenced():
        model, tokenizer = _load_base(base, adapter_dir, shapes, outputs)
        _resize_embedding(model, shapes)
        _merge(model, adapter_dir, base)
        model.config.get_text_config().pad_token_id = _pad_token_id(model.config, tokenizer)
        model.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
    for name in (TRAINING_MANIFEST_FILE, DESCRIPTION_FILE):
        if (adapter_dir / name).is_file():
            shutil.copyfile(adapter_dir / name, out_dir / name)
    return out_dir


def _read_config(adapter_dir: Path) -> Mapping[str, Any]:
    if not (adapter_dir / ADAPTER_CONFIG_FILE).is_file():
        raise CheckpointError(f"{adapter_dir} is not a PEFT adapter: it has no {ADAPTER_CONFIG_FILE}.")
    return read_json(adapter_dir / ADAPTER_CONFIG_FILE)


def _output_names(adapter_dir: Path) -> tuple[str, ...]:
    """Return the names of the outputs that ``reward_model.json`` beside the adapter gives; without it there is one."""
    description = read_description(adapter_dir)
    return ("reward",) if description is None else description.outputs


def _validate_head(shapes: Mapping[str, Sequence[int]], adapter_dir: Path, num_outputs: int) -> None:
    """Check the number of outputs of a head in the adapter; without one, the head must be the base's."""
    wanted = "a reward model has one. Train with num_labels=1"
    if num_outputs > 1:
        wanted = f"{DESCRIPTION_FILE} names {num_outputs}. Take both from the same model"
    for name, shape in shapes.items():
        if _is_head(name) and shape[0] != num_outputs:
            raise CheckpointError(f"{name} of {adapter_dir / ADAPTER_WEIGHTS_FILE} has {shape[0]} outputs; {wanted}.")


def _refuse_unmergeable(config: Mapping[str, Any], adapter_dir: Path) -> None:
    if config.get("peft_type") in PROMPT_LEARNING:
        raise CheckpointError(
            f"{adapter_dir} is a {config['peft_type']} adapter: it puts trained vectors before every text instead of "
            "changing weights, so it cannot be merged; train a LoRA adapter, or a whole model."
        )


def _resize_embedding(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the base's embedding as many rows as the adapter stores, as the trainer did when it added tokens."""
    embedding = model.get_input_embeddings().weight
    name = next(name for name, weight in model.named_parameters() if weight is embedding)
    stored = shapes.get(PEFT_PREFIX + name)
    if stored is not None and stored[0] != embedding.shape[0]:
        model.resize_token_embeddings(stored[0], mean_resizing=False)  # all rows are then overwritten


def _is_head(tensor_name: str) -> bool:
    parts = tensor_name.split(".")
    return parts[-1] == "weight" and parts[-2] in HEAD_NAMES


def _tensor_shapes(adapter_dir: Path) -> dict[str, list[int]]:
    weights = adapter_dir / ADAPTER_WEIGHTS_FILE
    if not weights.is_file():
        if (adapter_dir / PICKLED_WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"{adapter_dir / PICKLED_WEIGHTS_FILE} is a pickle file, which can run any code when it is opened; "
                "save the adapter again as safetensors (save_pretrained of a current PEFT does)."
            )
        if any(adapter_dir.glob("model*.safetensors")):
            raise CheckpointError(
                f"{adapter_dir} holds whole weights and an {ADAPTER_CONFIG_FILE} without {ADAPTER_WEIGHTS_FILE}: if "
                f"the adapter is merged into the weights, delete {ADAPTER_CONFIG_FILE}, which transformers follows too."
            )
        raise CheckpointError(f"{adapter_dir} has no {ADAPTER_WEIGHTS_FILE}; copy the whole adapter folder.")
    check_headers([weights])
    try:
        with safe_open(weights, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"{weights} cannot be read ({error}); copy the adapter folder again.") from error


def _locate_base(config: Mapping[str, Any], base_dir: Path | None) -> Path | str:
    if base_dir is not None:
        if not base_dir.is_dir():
            raise CheckpointError(f"The base model's folder {base_dir} does not exist.")
        return base_dir
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{ADAPTER_CONFIG_FILE} names no base model; give its folder as the base of the adapter.")
    if name == DEMO_BASE:
        return obtain_demo_base()
    try:
        return local_folder(name)
    except CheckpointError as error:
        raise CheckpointError(f"The adapter's base model {name} cannot be loaded: {error}") from error


def _load_base(
    base: Path | str, adapter_dir: Path, adapter_tensors: Mapping[str, Sequence[int]], outputs: Sequence[str]
) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if (Path(base) / CONFIG_FILE).is_file():
        check_configuration(Path(base) / CONFIG_FILE, read_json(Path(base) / CONFIG_FILE))
    refuse_described_head(Path(base), "the base of an adapter")
    refuse_quantized(Path(base), "the base of an adapter")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            base, **_labels(outputs), use_safetensors=True, output_loading_info=True
        )
        has_tokenizer = (adapter_dir / TOKENIZER_CONFIG_FILE).is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter_dir if has_tokenizer else base)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"The adapter's base model {base} cannot be loaded ({type(error).__name__}); "
            "give the folder that holds it, or make the hub reachable."
        ) from error
    missing_heads = [name for name in report["missing_keys"] if _is_head(f".{name}")]
    if missing_heads and not any(map(_is_head, adapter_tensors)):
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_WEIGHTS_FILE} has no classification head ({' or '.join(HEAD_NAMES)}), nor has the "
            f"base model {base}, and a new one would be random. Train with PEFT's task type SEQ_CLS, or list the head "
            "in modules_to_save."
        )
    absent = {name for name in report["missing_keys"] if PEFT_PREFIX + name not in adapter_tensors}
    if absent:
        raise CheckpointError(
            f"Neither the base model {base} nor the adapter has {min(absent)}, so it would be random. "
            "Name its module in modules_to_save, train and save again."
        )
    return model, tokenizer


def _labels(outputs: Sequence[str]) -> dict[str, Any]:
    if len(outputs) == 1:
        return {"num_labels": 1}
    return {"id2label": dict(enumerate(outputs)), "label2id": {name: index for index, name in enumerate(outputs)}}


def _merge(model: Any, adapter_dir: Path, base: Path | str) -> None:
    """Merge in place: afterwards ``model`` is the plain model with the adapted weights and a head in fp32."""
    import torch
    from peft import PeftModel

    stored_dtype = model.dtype
    try:
        PeftModel.from_pretrained(model.to(torch.float32), adapter_dir).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The adapter {adapter_dir} does not match the base model {base} ({type(error).__name__}); "
            "give the base that it was trained on."
        ) from error
    model.base_model.to(stored_dtype)


def _pad_token_id(config: Any, tokenizer: Any) -> int | None:
    """Return the pad token that training used: the tokenizer's, else the config's, else the EOS token, as in TRL.

    It determines which position is pooled, so it must be the one of training.
    """
    for pad_id in (tokenizer.pad_token_id, config.get_text_config().pad_token_id, tokenizer.eos_token_id):
        if pad_id is not None:
            return int(pad_id)
    return None
