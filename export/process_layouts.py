"""The layouts of process reward models, which reward the steps of a solution.

A layout says what was put after each step, how the steps were tokenized, what the prompt looked like, and which of the
head's numbers is the reward of a step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.checkpoints.reward_description import Probability, StepRule
from service.errors import CheckpointError

if TYPE_CHECKING:
    from export.converted_head import ConvertedHead


@dataclass(frozen=True, slots=True)
class ProcessLayout:
    """A way of training rewards of steps."""

    name: str

    models: str
    """Published models that have it."""

    outputs: tuple[str, ...]
    """Names of the head's numbers."""

    positive: str
    """The output whose probability is the reward of a step."""

    marker: str
    """The text that was put after each step."""

    marker_token: str
    """The text whose last token is the one where the head is read."""

    separate: bool = False
    """Whether each step was tokenized alone and followed by the marker's token."""

    architectures: tuple[str, ...] = ()
    """Classes in ``config.json`` that have it; empty: the user has to name the layout."""

    label_tokens: tuple[str, str] | None = None
    """The tokens of the language model's head that are the outputs; None: the model has a head of its own."""

    chat_template: str = ""
    """The text around prompt and steps, as a chat template; empty: that of the tokenizer."""


PROCESS_LAYOUTS = (
    ProcessLayout(
        "Qwen2ForProcessRewardModel",
        "Qwen/Qwen2.5-Math-PRM-7B and -72B, Qwen/Qwen2.5-Math-7B-PRM800K",
        ("negative", "positive"),
        "positive",
        marker="<extra_0>",
        marker_token="<extra_0>",  # noqa: S106 - a token of text, not a password
        architectures=("Qwen2ForProcessRewardModel",),
    ),
    ProcessLayout(
        "Skywork-o1-PRM",
        "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B and -7B",
        ("reward",),
        "reward",
        marker="\n",
        marker_token="\n",  # noqa: S106
        separate=True,
        chat_template="{{ bos_token or '' }}{% for message in messages %}{{ message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '' }}{% endfor %}",
    ),
    ProcessLayout(
        "Math-Shepherd",
        "peiyi9979/math-shepherd-mistral-7b-prm",
        ("+", "-"),
        "+",
        marker=" \u043a\u0438\n",
        marker_token="\u043a\u0438",  # noqa: S106
        label_tokens=("+", "-"),
        chat_template="{{ bos_token or '' }}{% for message in messages %}{{ message['content'] }}"
        "{{ ' ' if message['role'] == 'user' else '' }}{% endfor %}",
    ),
)
"""Of Skywork-o1-PRM the two encodings of a text meet only between tokens of the prompt and of each step."""


def process_layout_of(config: Any, name: str | None) -> ProcessLayout | None:
    """Return the layout that the user names, or that of the source's class; None where the model rewards whole texts.

    Raises:
        CheckpointError: there is no layout of that name.
    """
    if name is not None:
        named = next((layout for layout in PROCESS_LAYOUTS if layout.name == name), None)
        if named is None:
            known = ", ".join(layout.name for layout in PROCESS_LAYOUTS)
            raise CheckpointError(f"There is no layout of process reward models named {name}: name one of {known}.")
        return named
    architectures = set(config.architectures or ())
    return next((layout for layout in PROCESS_LAYOUTS if architectures & set(layout.architectures)), None)


def step_rule(layout: ProcessLayout, folder: Path) -> StepRule:
    """Return where a model of this layout is read, with the token id of its own tokenizer.

    Raises:
        CheckpointError: the tokenizer has no token for the marker.
    """
    tokenizer = _tokenizer(folder)
    ids = tokenizer(layout.marker_token, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids[-1:]).strip(" ") if ids else ""
    if decoded != layout.marker_token:
        raise CheckpointError(
            f"The tokenizer of {folder} has no token for {layout.marker_token!r}, which the layout {layout.name} puts "
            "after each step: take the tokenizer of the model."
        )
    return StepRule(layout.marker, int(ids[-1]), separate=layout.separate)


def label_token_ids(layout: ProcessLayout, folder: Path) -> tuple[str, ...]:
    """Return the tokens whose logits are the outputs, as arguments of ``TokenLogits``.

    They are those in a text where a space separates them, as the models' cards compute them.
    """
    tokens = layout.label_tokens or ()
    ids = _tokenizer(folder)(" ".join(tokens), add_special_tokens=False)["input_ids"]
    return tuple(f"id:{token_id}" for token_id in ids[-len(tokens) :])


def with_step_outputs(found: ConvertedHead, layout: ProcessLayout) -> ConvertedHead:
    """Return a head with the names and the rule of a layout."""
    return dataclasses.replace(found, outputs=layout.outputs, combine=Probability(layout.positive))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
