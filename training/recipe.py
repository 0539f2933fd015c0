"""The hyperparameters of a training run, in one frozen record that is written into the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.data.holdout import HOLD_OUT_PERCENT


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of a training run."""

    full: bool = False
    """Train all weights instead of a LoRA adapter."""

    lora_rank: int = 16
    """Rank of the LoRA update (Hu et al. 2021); its scale alpha is twice the rank."""

    lora_layers: int | None = None
    """Number of the topmost layers that are adapted; None: all. No gradient is computed for the layers below."""

    learning_rate: float = 2e-4
    """Peak of the learning rate, which then decays to zero along a cosine."""

    warmup_share: float = 0.05
    """Share of the steps during which the learning rate rises linearly."""

    epochs: float = 1.0
    """Passes over the pairs."""

    max_length: int = 1024
    """Tokens; pairs in which a side is longer are left out, never truncated."""

    shorten_prompts: bool = False
    """Remove the oldest messages of long conversations before ``max_length`` is applied."""

    batch_pairs: int = 16
    """Pairs of an optimizer step."""

    micro_batch_pairs: int = 4
    """Pairs of a backward pass, which determine the memory that is needed."""

    hold_out_percent: float = HOLD_OUT_PERCENT
    """Percentage of the prompts that are never trained on (see service.data.holdout)."""

    balance_lengths: bool = False
    """Leave pairs out until the longer completion is chosen as often as the shorter one."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the frozen weights, the computation and the saved weights; weights in training are fp32."""

    checkpoint_steps: int = 50
    """Optimizer steps between saved checkpoints."""

    eval_steps: int = 100
    """Optimizer steps between evaluations."""

    eval_pairs: int = 300
    """Largest number of pairs of an evaluation during training."""

    patience: int | None = None
    """Stop after this many evaluations without a lower loss, and restore the best weights; None: train to the end."""

    center_coefficient: float | None = None
    """Weight of the centring term, which fixes the zero of the rewards (see training.tensor_loss); None: no term."""

    min_support: float | None = None
    """Leave out pairs of which a smaller share of the annotators preferred the chosen completion; pairs without reviews
    are included. None: include all pairs."""

    seed: int = 0
    """Of the order of pairs and of random draws."""

    @property
    def accumulation_steps(self) -> int:
        """Backward passes per optimizer step."""
        return max(1, self.batch_pairs // self.micro_batch_pairs)
