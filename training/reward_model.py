"""Loads the model that training starts from, a pretrained transformer with a scalar head, and configures LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from service.checkpoints.architecture import max_positions
from service.engines.devices.device import has_native_bfloat16
from service.errors import CheckpointError, SettingsError
from service.transformers_logging import transformers_silenced
from training.base_checkpoint import check_against_base, other_outputs
from training.recipe import Recipe

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def multiplies_bfloat16() -> bool:
    """Whether the device that trains, CUDA where there is one, multiplies bfloat16 natively."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return has_native_bfloat16()


def load_base(base: Path, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint folder as a reward model; the recipe's dtype is resolved.

    A base without a scalar head gets one of zeros, so that all initial rewards are equal; the head of a reward model is
    retained. Weights to be trained are in fp32, because small updates are lost in bf16; others have the recipe's dtype.
    A base without a pad token pads with its end-of-sequence token, which pooling then skips (transformers' rule).

    Raises:
        CheckpointError: the base cannot be loaded, has neither a pad nor an end-of-sequence token, has weights of
            another shape than a model with a scalar head, or lacks weights other than the head, which an adapter would
            leave random.
        SettingsError: the recipe has more layers or positions than the base.
    """
    dtype = torch.float32 if recipe.full else TORCH_DTYPES[recipe.dtype]
    try:
        # Transformers warns about a missing head, which is expected here.
        with transformers_silenced():
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                base,
                **_labels(recipe),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The base model {base} cannot be loaded ({type(error).__name__}); "
            "give a checkpoint folder, a hub id that can be reached, or 'demo'."
        ) from error
    _refuse_other_shapes(base, report["mismatched_keys"], recipe)
    check_against_base(recipe, model.config.get_text_config().num_hidden_layers, max_positions(model))
    _set_pad_token(model, tokenizer)
    _prepare_head(model, missing=set(report["missing_keys"]), recipe=recipe)
    return model, tokenizer


def num_outputs(recipe: Recipe) -> int:
    """Outputs of the head that a recipe trains."""
    return max(1, len(recipe.objectives))


def _labels(recipe: Recipe) -> dict[str, Any]:
    if not recipe.objectives:
        return {"num_labels": 1}
    labels = dict(enumerate(recipe.objectives))
    return {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}


def _refuse_other_shapes(
    base: Path, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], recipe: Recipe
) -> None:
    """Refuse weights that were left random because their stored shape (the second entry) is not the model's."""
    for name, stored, wanted in mismatched:
        if wanted[0] == num_outputs(recipe) and stored[1:] == wanted[1:]:
            raise CheckpointError(other_outputs(str(base), name, stored[0], wanted[0]))
        raise CheckpointError(
            f"{name} of {base} has the shape {list(stored)}, but its config.json describes {list(wanted)}: "
            "copy or save the checkpoint again."
        )


def _set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError("The base's tokenizer has neither a pad nor an end-of-sequence token; set one first.")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _prepare_head(model: PreTrainedModel, *, missing: set[str], recipe: Recipe) -> None:
    name, head = reward_head(model, num_outputs(recipe))
    fresh = {f"{name}.{parameter}" for parameter, _ in head.named_parameters()} & missing
    if missing - fresh and not recipe.full:
        raise CheckpointError(
            f"The base lacks {min(missing - fresh)}, which an adapter would leave random; "
            "train all weights with --full."
        )
    head.float()
    if fresh:
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)


def reward_head(model: PreTrainedModel, outputs: int = 1) -> tuple[str, torch.nn.Linear]:
    """Return name and module of the head: the last linear layer with that number of outputs.

    Raises:
        CheckpointError: the model has none.
    """
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and module.out_features == outputs:
            return name, module
    raise CheckpointError(
        f"The base model's classification head is not a linear layer with {outputs} outputs; it is required."
    )


def lora_config(model: PreTrainedModel, recipe: Recipe) -> LoraConfig:
    """Return the LoRA configuration (Hu et al. 2021): all linear layers of the adapted blocks, and the whole head.

    The task type makes PEFT train and save the classification head beside the adapter.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    num_adapted = num_layers if recipe.lora_layers is None else recipe.lora_layers
    _, head = reward_head(model, num_outputs(recipe))
    linear_names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        target_modules=sorted(linear_names),
        layers_to_transform=list(range(num_layers - num_adapted, num_layers)),
    )


def check_continued_adapter(model: PreTrainedModel, folder: Path, recipe: Recipe) -> None:
    """Check that a trained adapter can be trained further with a recipe.

    Args:
        model: of `load_base`, of the base that the adapter was trained on.
        folder: of the adapter.
        recipe: must describe an adapter of the same shape.

    Raises:
        CheckpointError: the folder holds no adapter that can be loaded.
        SettingsError: the adapter has another rank, or adapts other layers or modules.
    """
    try:
        saved = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no adapter: give the folder of one that reward-train wrote.") from error
    wanted = lora_config(model, recipe)
    if _shape(saved) != _shape(wanted):
        raise SettingsError(
            f"The adapter in {folder} has rank {saved.r} on {len(saved.layers_to_transform or ())} layers: give "
            "--lora-rank and --lora-layers the same values."
        )


def continued_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model with a trained adapter and its head, in fp32, to be trained further."""
    continued = PeftModel.from_pretrained(model, folder, is_trainable=True)
    for config in continued.peft_config.values():  # PEFT adds the head's names to those that the file has
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return continued


def _shape(config: LoraConfig) -> tuple[object, ...]:
    return config.r, config.lora_alpha, set(config.target_modules), sorted(config.layers_to_transform or ())
