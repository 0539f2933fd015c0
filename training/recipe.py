"""The hyperparameters of a training run, in one frozen record that is written into the manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from service.data.holdout import HOLD_OUT_PERCENT
from service.errors import SettingsError
from training.contrast import FAMILIES, share_out

DtypeChoice: TypeAlias = Literal["auto", "bf16", "fp32"]

MAX_OBJECTIVES = 64
"""Outputs of one model."""

MAX_CONTRAST = 10
"""Contrast pairs for each preference pair."""

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy accepts."""


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

    dtype: DtypeChoice = "auto"
    """Of the frozen weights, the computation and the saved weights; weights in training are fp32. ``auto`` is bf16
    where the device multiplies it natively, else fp32 (see `resolve_dtype`)."""

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

    objectives: tuple[str, ...] = ()
    """Names of the outputs, each trained on the pairs that are labelled with it; empty: one output for all pairs."""

    objective_weights: tuple[float, ...] = ()
    """Weight of each objective in the reward, in their order; empty: the model has no reward without other weights."""

    contrast: float = 0.0
    """Contrast pairs to make and to train on for each preference pair that is trained on (see training.contrast)."""

    contrast_families: tuple[str, ...] = ()
    """The families of contrast pairs; empty: all of them, in equal shares."""

    contrast_weights: tuple[float, ...] = ()
    """Weight of each of those families in the share of the pairs that it gets."""

    seed: int = 0
    """Of the order of pairs and of random draws."""

    def accumulation_steps(self, num_processes: int = 1) -> int:
        """Backward passes of each process per optimizer step.

        Raises:
            SettingsError: the pairs of a step are not a multiple of the pairs of a pass of all processes.
        """
        pairs_per_pass = self.micro_batch_pairs * num_processes
        if self.batch_pairs % pairs_per_pass:
            passes = f"--micro-batch-pairs {self.micro_batch_pairs}"
            if num_processes > 1:
                passes += f" in {num_processes} processes"
            raise SettingsError(f"--batch-pairs {self.batch_pairs} is not a multiple of {passes}: change one of them.")
        return self.batch_pairs // pairs_per_pass


def check_recipe(recipe: Recipe) -> None:
    """Check every hyperparameter by itself, and the batch of one process.

    Raises:
        SettingsError: a value is out of range; names the option.
    """
    # Each line: option, value, whether it is in range, and the range. Comparisons with NaN are false.
    ranges = (
        ("--lora-rank", recipe.lora_rank, recipe.lora_rank >= 1, "at least 1"),
        ("--lora-layers", recipe.lora_layers, _is_positive(recipe.lora_layers), "at least 1"),
        ("--learning-rate", recipe.learning_rate, 0 < recipe.learning_rate < math.inf, "greater than 0"),
        ("--warmup-share", recipe.warmup_share, 0 <= recipe.warmup_share <= 1, "from 0 to 1"),
        ("--epochs", recipe.epochs, 0 < recipe.epochs < math.inf, "greater than 0"),
        ("--max-length", recipe.max_length, recipe.max_length >= 1, "at least 1"),
        ("--batch-pairs", recipe.batch_pairs, recipe.batch_pairs >= 1, "at least 1"),
        ("--micro-batch-pairs", recipe.micro_batch_pairs, recipe.micro_batch_pairs >= 1, "at least 1"),
        ("--hold-out-percent", recipe.hold_out_percent, 0 <= recipe.hold_out_percent < 100, "from 0 to less than 100"),
        (
            "--min-support",
            recipe.min_support,
            recipe.min_support is None or 0 <= recipe.min_support <= 1,
            "from 0 to 1",
        ),
        ("--center-coefficient", recipe.center_coefficient, _is_coefficient(recipe.center_coefficient), "at least 0"),
        ("--patience", recipe.patience, _is_positive(recipe.patience), "at least 1"),
        ("--eval-steps", recipe.eval_steps, recipe.eval_steps >= 1, "at least 1"),
        ("--eval-pairs", recipe.eval_pairs, recipe.eval_pairs >= 1, "at least 1"),
        ("--checkpoint-steps", recipe.checkpoint_steps, recipe.checkpoint_steps >= 1, "at least 1"),
        ("--contrast", recipe.contrast, 0 <= recipe.contrast <= MAX_CONTRAST, f"from 0 to {MAX_CONTRAST}"),
        ("--seed", recipe.seed, 0 <= recipe.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
    )
    for option, value, is_in_range, wanted in ranges:
        if not is_in_range:
            raise SettingsError(f"{option} is {value}; it must be {wanted}.")
    _check_objectives(recipe)
    _check_contrast(recipe)
    recipe.accumulation_steps()


def _check_objectives(recipe: Recipe) -> None:
    names, weights = recipe.objectives, recipe.objective_weights
    if len(names) == 1 or len(set(names)) < len(names):
        raise SettingsError("--objectives has one name, or a name twice: name two or more outputs, each once.")
    if len(names) > MAX_OBJECTIVES:
        raise SettingsError(f"--objectives has {len(names)} names; it must have at most {MAX_OBJECTIVES}.")
    if weights and len(weights) != len(names):
        raise SettingsError("--objectives has weights for some of the names only: give all of them one, or none.")


def _check_contrast(recipe: Recipe) -> None:
    names, weights = recipe.contrast_families, recipe.contrast_weights
    if names and not recipe.contrast:
        raise SettingsError("--contrast-families needs --contrast: say how many contrast pairs to make.")
    if recipe.contrast and recipe.objectives:
        raise SettingsError("--contrast and --objectives exclude each other: a contrast pair has no objective.")
    for name in names:
        if name not in FAMILIES:
            raise SettingsError(f"--contrast-families does not know {name!r}: use some of {', '.join(FAMILIES)}.")
    if len(set(names)) < len(names):
        raise SettingsError("--contrast-families has a name twice: name each family once.")
    if not all(0 < weight < math.inf for weight in weights):
        raise SettingsError("--contrast-families has a weight that is not greater than 0.")


def contrast_counts(recipe: Recipe, num_pairs: int) -> dict[str, int]:
    """Return the number of contrast pairs by family beside that number of preference pairs; empty without contrast."""
    if not recipe.contrast:
        return {}
    names = recipe.contrast_families or tuple(FAMILIES)
    weights = recipe.contrast_weights or (1.0,) * len(names)
    return share_out(round(recipe.contrast * num_pairs), dict(zip(names, weights, strict=True)))


def resolve_dtype(choice: DtypeChoice, *, native_bfloat16: bool) -> Literal["bf16", "fp32"]:
    """Return the dtype of a run: the choice, or for ``auto`` bf16 where the device multiplies it natively, else fp32.

    Without native products bf16 is several times slower than fp32, as for the service (``model.dtype``).
    """
    if choice != "auto":
        return choice
    return "bf16" if native_bfloat16 else "fp32"


def _is_positive(count: int | None) -> bool:
    return count is None or count >= 1


def _is_coefficient(value: float | None) -> bool:
    return value is None or 0 <= value < math.inf
