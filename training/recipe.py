"""The numbers of a training run, in one frozen record that goes into the manifest as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.data.holdout import HOLD_OUT_PERCENT


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a reward model is trained.

    ``lora_rank``: rank of the LoRA update (Hu et al. 2021); its scale alpha is twice the rank. ``full`` trains all
    weights instead. ``lora_layers``: how many of the topmost layers are adapted; None means all. Layers below are
    frozen, so no gradient is computed for them. ``learning_rate``: its peak, after a linear warm-up over
    ``warmup_share`` of the steps and before a cosine decay to zero. ``max_length``: tokens; pairs in which either
    side is longer are left out, never cut. ``shorten_prompts``: before that, long conversations lose their oldest
    exchanges. ``batch_pairs``: pairs per optimizer step; ``micro_batch_pairs``: pairs per
    backward pass, which is what memory must hold. ``hold_out_percent``: share of the prompts never trained on (see
    service.data.holdout). ``balance_lengths``: leave pairs out until longer and shorter completions win equally often.
    ``dtype``: of the frozen weights and of the computation; trained weights are kept in fp32 until they are saved.
    ``checkpoint_steps``, ``eval_steps``, ``eval_pairs``: optimizer steps between saved checkpoints and between
    evaluations on at most that many pairs while training. ``patience``: stop after that many evaluations without a
    lower loss, and keep the weights of the best one; None: train to the end. ``center_coefficient``: weight of a term
    that pins the zero of the rewards (see training.tensor_loss); None: the zero floats. ``min_support``: leave out
    pairs of which a smaller share of the reviewers chose the chosen completion; pairs without reviews stay.
    """

    full: bool = False
    lora_rank: int = 16
    lora_layers: int | None = None
    learning_rate: float = 2e-4
    warmup_share: float = 0.05
    epochs: float = 1.0
    max_length: int = 1024
    shorten_prompts: bool = False
    batch_pairs: int = 16
    micro_batch_pairs: int = 4
    hold_out_percent: float = HOLD_OUT_PERCENT
    balance_lengths: bool = False
    dtype: Literal["bf16", "fp32"] = "bf16"
    checkpoint_steps: int = 50
    eval_steps: int = 100
    eval_pairs: int = 300
    patience: int | None = None
    center_coefficient: float | None = None
    min_support: float | None = None
    seed: int = 0

    @property
    def accumulation_steps(self) -> int:
        """Backward passes per optimizer step."""
        return max(1, self.batch_pairs // self.micro_batch_pairs)
