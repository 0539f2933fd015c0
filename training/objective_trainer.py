"""TRL's reward trainer for a head with several outputs: the loss of a pair is that of its objective's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

OUTPUT_COLUMN = "output"
"""Column of the data set with the index of each pair's output."""


@dataclass
class OutputCollator(DataCollatorForPreference):  # type: ignore[misc]  # TRL is untyped
    """Batches pairs as TRL does, with the output of each."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch with the indices of the outputs, int64 [pair]."""
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | {OUTPUT_COLUMN: torch.tensor([example[OUTPUT_COLUMN] for example in examples])}


class ObjectiveTrainer(RewardTrainer):  # type: ignore[misc]  # TRL is untyped
    """Trains each output on the pairs of its objective, with TRL's loss and metrics."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss of the selected outputs; the other outputs of a pair get no gradient."""
        rest = {name: value for name, value in inputs.items() if name != OUTPUT_COLUMN}
        # Chosen and rejected sequences are the halves of a batch.
        outputs = inputs[OUTPUT_COLUMN].repeat(2)

        def selected(**arguments: Any) -> Any:
            answer = model(**arguments)
            answer.logits = answer.logits.gather(1, outputs[:, None])
            return answer

        return super().compute_loss(selected, rest, return_outputs, num_items_in_batch)
