"""Runs TRL's RewardTrainer with a recipe, on tokenized pairs.

The loss is TRL's: the negative log-likelihood of the Bradley-Terry model, with a centring term if the recipe has one.
``training.bradley_terry`` and ``training.tensor_loss`` define both, and tests compare TRL with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from service.transformers_logging import transformers_silenced
from training.arguments import CHECKPOINTS_FOLDER, LOG_FILE, RunOptions, list_checkpoints
from training.objective_trainer import OUTPUT_COLUMN, ObjectiveTrainer, OutputCollator
from training.objectives import one_label
from training.pairs import TokenizedPair
from training.processes import Processes
from training.progress import ProgressCallback, ProgressLine
from training.recipe import Recipe
from training.reward_model import TORCH_DTYPES, continued_adapter, lora_config
from training.shared_prompts import prompts_shared

LOGGING_STEPS = 10
"""Optimizer steps between logged metrics; a run of fewer than a hundred steps logs more often."""


class LogFile(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Appends the metrics that the trainer logs (loss, accuracy, margin, ...) to a file, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is transformers'
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append one line, in the first process only."""
        if not state.is_world_process_zero:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The result of a training run."""

    model: PreTrainedModel
    """A PEFT model unless the recipe trains all weights."""

    num_steps: int
    """Optimizer steps of the run."""

    selected_step: int
    """The step whose weights ``model`` has."""


def run_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_pairs: Sequence[TokenizedPair],
    eval_pairs: Sequence[TokenizedPair],
    recipe: Recipe,
    out_dir: Path,
    *,
    options: RunOptions,
    processes: Processes,
    line: ProgressLine,
    adapter: Path | None = None,
) -> TrainingRun:
    """Train, and return the trained model, rounded to the recipe's dtype.

    It is rounded because that is how it is saved, so that an evaluation afterwards is one of the saved weights.
    Checkpoints go to ``out_dir/checkpoints`` and metrics to ``out_dir/log.jsonl``. Pairs longer than the recipe's limit
    must have been left out before, and its dtype must be resolved. With ``recipe.patience`` training stops when the
    loss on ``eval_pairs`` no longer falls, and the model is the one with the lowest loss.

    With ``adapter`` the training of that adapter is continued; `check_continued_adapter` must have allowed it.

    Raises:
        TrainingError: the loss is not finite.
    """
    # TRL and PEFT use names that transformers deprecates, and report what is done on purpose here.
    with transformers_silenced():
        adapted = model if adapter is None else continued_adapter(model, adapter)
        several = recipe.objectives
        make = ObjectiveTrainer if several else RewardTrainer
        with one_label(model):
            trainer = make(
                model=adapted,
                data_collator=OutputCollator(tokenizer.pad_token_id) if several else None,
                args=_trainer_settings(
                    recipe,
                    num_pairs=len(train_pairs),
                    evaluates=bool(eval_pairs),
                    out_dir=out_dir,
                    num_processes=processes.count,
                    report_to=options.report_to,
                ),
                train_dataset=_as_dataset(train_pairs, several),
                eval_dataset=(
                    _as_dataset(sorted(eval_pairs, key=lambda pair: pair.num_tokens), several) if eval_pairs else None
                ),
                processing_class=tokenizer,
                peft_config=None if recipe.full or adapter is not None else lora_config(model, recipe),
                callbacks=[ProgressCallback(line, recipe.batch_pairs), *_callbacks(recipe, out_dir)],
            )
        trainer.remove_callback(PrinterCallback)
        with prompts_shared(model), _inputs_as_computed(trainer.model, recipe), line.shown():
            trainer.train(resume_from_checkpoint=str(list_checkpoints(out_dir)[-1]) if options.resume else None)
    trained = trainer.accelerator.unwrap_model(trainer.model).to(TORCH_DTYPES[recipe.dtype])
    if processes.count > 1:
        trainer.accelerator.end_training()
    return TrainingRun(
        model=trained,
        num_steps=trainer.state.global_step,
        selected_step=trainer.state.global_step if recipe.patience is None else trainer.state.best_global_step,
    )


def _inputs_as_computed(model: torch.nn.Module, recipe: Recipe) -> AbstractContextManager[None]:
    """Let PEFT not widen the inputs of an adapter to fp32 where autocast computes in bf16: it would round them back."""
    if recipe.full or recipe.dtype != "bf16":
        return nullcontext()
    casting: AbstractContextManager[None] = disable_input_dtype_casting(model)
    return casting


def _callbacks(recipe: Recipe, out_dir: Path) -> list[TrainerCallback]:
    log = LogFile(out_dir / LOG_FILE)
    return [log] if recipe.patience is None else [log, EarlyStoppingCallback(recipe.patience)]


def _trainer_settings(
    recipe: Recipe,
    *,
    num_pairs: int,
    evaluates: bool,
    out_dir: Path,
    num_processes: int = 1,
    report_to: Sequence[str] = (),
) -> RewardConfig:
    num_steps = math.ceil(recipe.epochs * math.ceil(num_pairs / recipe.batch_pairs))
    stops_early = recipe.patience is not None
    return RewardConfig(
        output_dir=str(out_dir / CHECKPOINTS_FOLDER),
        run_name=out_dir.resolve().name,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.micro_batch_pairs,
        per_device_eval_batch_size=2 * recipe.micro_batch_pairs,
        gradient_accumulation_steps=recipe.accumulation_steps(num_processes),
        activation_checkpointing=False,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup_share * num_steps),
        max_length=None,  # longer pairs were left out and counted before
        center_rewards_coefficient=recipe.center_coefficient,
        bf16=recipe.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        # Batches of similar lengths have little padding; the sampler reads the lengths from this column.
        train_sampling_strategy="group_by_length",
        length_column_name="num_tokens",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=max(1, min(LOGGING_STEPS, num_steps // 10)),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the progress callback ends the run instead
        disable_tqdm=True,
        # The best weights can only be restored from a saved checkpoint.
        save_steps=recipe.eval_steps if stops_early else recipe.checkpoint_steps,
        save_total_limit=2,
        load_best_model_at_end=stops_early,
        metric_for_best_model="eval_loss" if stops_early else None,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.eval_steps,
        seed=recipe.seed,
        report_to=list(report_to) or "none",
    )


def _as_dataset(pairs: Sequence[TokenizedPair], objectives: Sequence[str] = ()) -> Dataset:
    outputs = {OUTPUT_COLUMN: [objectives.index(pair.pair.objective) for pair in pairs]} if objectives else {}
    return Dataset.from_dict(
        {
            **outputs,
            "chosen_ids": [list(pair.chosen_ids) for pair in pairs],
            "rejected_ids": [list(pair.rejected_ids) for pair in pairs],
            "num_tokens": [pair.num_tokens for pair in pairs],
        }
    )
