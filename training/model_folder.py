"""The folder of a trained model: written as a whole, validated as the service does, and without leftovers.

Files are written into a temporary folder within it and moved at the end, so an interrupted run leaves no half a model;
``training.json`` is moved last, and a folder with it is a finished model.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from peft import PeftModel
from reward_client.provenance import TRAINING_MANIFEST_FILE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.checkpoints.adapter import merge_adapter
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.reward_description import write_description
from service.errors import CheckpointError
from service.settings import ModelSettings
from service.transformers_logging import transformers_silenced
from training.manifest import Manifest
from training.model_card import CARD_FILE, model_card
from training.objectives import describe_outputs


def clear_folder(folder: Path) -> None:
    """Delete the content of a folder, if it exists."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    base_dir: Path,
    folder: Path,
) -> None:
    """Write model, tokenizer, model card and manifest into an existing folder.

    Args:
        model: a PEFT model, of which the adapter is written, or a whole model.
        tokenizer: with the pad token of training.
        manifest: of the run.
        base_dir: the folder of the base, which an adapter names unless its base has a name without a folder.
        folder: it keeps its other files.

    Raises:
        CheckpointError: the service would refuse the whole model.
    """
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as work_dir:
        unfinished = Path(work_dir)
        with transformers_silenced():
            _save(model, tokenizer, manifest.base, base_dir, unfinished)
        write_description(unfinished, describe_outputs(manifest.recipe))
        card = model_card(manifest, folder, is_adapter=not manifest.recipe.full)
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
        if manifest.recipe.full:
            _validate(unfinished, folder)
        manifest.write(unfinished)
        names = sorted(path.name for path in unfinished.iterdir())
        for name in sorted(names, key=TRAINING_MANIFEST_FILE.__eq__):
            (unfinished / name).replace(folder / name)


def write_merged(adapter_dir: Path, manifest: Manifest, base_dir: Path, merged_dir: Path) -> None:
    """Merge an adapter into its base and put the plain checkpoint in place of ``merged_dir``, once it is valid.

    Raises:
        CheckpointError: the service would refuse the merged checkpoint.
    """
    merged_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{merged_dir.name}-", dir=merged_dir.parent) as work_dir:
        unfinished = merge_adapter(adapter_dir, Path(work_dir) / "checkpoint", base_dir)
        (unfinished / CARD_FILE).write_text(model_card(manifest, merged_dir, is_adapter=False), encoding="utf-8")
        _validate(unfinished, merged_dir)
        clear_folder(merged_dir)
        if merged_dir.is_dir():
            merged_dir.rmdir()
        unfinished.rename(merged_dir)


def _validate(unfinished: Path, folder: Path) -> None:
    try:
        open_checkpoint(unfinished, ModelSettings(path=str(unfinished)))
    except CheckpointError as error:
        refusal = str(error).replace(str(unfinished), str(folder))
        raise CheckpointError(f"The trained model would be refused by the service: {refusal}") from error


def _save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    base_dir: Path,
    folder: Path,
) -> None:
    if isinstance(model, PeftModel):
        # A relative path would name the base only for commands that run in the same folder.
        is_folder = Path(base).expanduser().is_dir()
        model.active_peft_config.base_model_name_or_path = str(base_dir.resolve()) if is_folder else base
        # The embeddings are never adapted; by default PEFT would look the base up on the hub to find that out.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
