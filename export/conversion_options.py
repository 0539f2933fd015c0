"""What the user says of a conversion; see ``export.convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.token_logits import TokenLogits
from service.checkpoints.reward_description import Combination
from service.records import Activation


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What the user says of a conversion."""

    base: Path | None = None
    """The adapter's base model; required where the adapter names none that can be found."""

    drop_bias: bool = False
    """Leave out the bias of a linear head, so that the result is a plain classifier. That shifts all rewards by one
    constant."""

    allow_pickle: bool = False
    """Also read pickled weights, with torch's restricted unpickler, which allows tensors only."""

    activation: Activation | None = None
    """The function between the layers of a deeper head of an unknown layout."""

    outputs: tuple[str, ...] = ()
    """Names of the numbers of a head that gives several; of a gated head its objectives."""

    gate_pattern: str | None = None
    """The text between prompt and completion, where a gate reads; None: that of the model's type."""

    token_logits: TokenLogits | None = None
    """The tokens of a language model whose logits are the reward."""

    process: str | None = None
    """Name of the layout of a process reward model; None: that of the source's class, where there is one."""

    members: tuple[Path, ...] = ()
    """Further members of an ensemble: checkpoints on the same body, or files of heads."""

    combine: Combination | None = None
    """How the members' numbers become the reward."""

    chat_template: Path | None = None
    """The chat template of the result; None: that of the source."""
