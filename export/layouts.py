"""The layouts of published reward models that ``reward-convert`` recognises, from configuration and tensor names alone.

A layout says which tensors are the head, which activation stands between its layers, which token training read, and
what it appended. What is not recognised is refused, because an activation cannot be told from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.process_layouts import PROCESS_LAYOUTS
from service.checkpoints.reward_description import LinearLayer
from service.checkpoints.validation import describe_names
from service.checkpoints.weights import TensorInfo
from service.errors import CheckpointError
from service.records import Activation, Pooling

LAYER = re.compile(r"(?P<module>.+?)(\.(?P<index>\d+))?\.(?P<kind>weight|bias)")
"""The name of a tensor of a linear layer: ``score.weight``, or ``score.2.bias`` in a sequence of modules."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of storing a reward model."""

    name: str

    models: str
    """Published models, or training libraries, that store it."""

    module: str
    """Name of the head's module."""

    architectures: tuple[str, ...] = ()
    """Classes in ``config.json`` that have it; empty: any class."""

    activation: Activation | None = None
    """The activation between the layers; None: the head is one linear layer."""

    gate: str = ""
    """What weights several objectives, in words; empty: the head has no gate."""

    pooling: Pooling = "last"
    """``last`` where training read the last token of the text, ``hf`` where it skipped pad tokens."""

    text: str = ""
    """What the text of training looked like, where its tokenizer has no chat template."""


LAYOUTS = (
    Layout("TRL", "TRL's AutoModelForCausalLMWithValueHead, LLaMA-Factory", "v_head.summary"),
    Layout("GRM", "Ray2333/GRM-* with a head of several layers", "v_head.summary", activation="relu"),
    Layout("InternLM2", "internlm/internlm2-*-reward", "v_head", ("InternLM2ForRewardModel",)),
    Layout(
        "Starling",
        "berkeley-nest/Starling-RM-7B-alpha, CarperAI",
        "v_head",
        text="Starling-RM was trained on conversations between [INST] and [/INST] that end in </s>",
    ),
    Layout(
        "UltraRM",
        "openbmb/UltraRM-13b, openbmb/Eurus-RM-7b",
        "regression_head",
        text="UltraRM was trained on texts with Human: and Assistant:, Eurus-RM on texts with [INST] and [/INST]",
    ),
    Layout(
        "Beaver",
        "PKU-Alignment/beaver-7b-*-reward and -cost",
        "score_head",
        text="Beaver was trained on texts of the form BEGINNING OF CONVERSATION: USER: ... ASSISTANT: ...",
    ),
    Layout(
        "OpenAssistant",
        "OpenAssistant/oasst-rm-2-pythia-*",
        "out_proj",
        ("GPTNeoXRewardModel",),
        text="OpenAssistant trained on turns with <|prompter|> and <|assistant|> that end in <|endoftext|>",
    ),
    Layout(
        "Qwen2ForRewardModel",
        "Qwen/Qwen2.5-Math-RM-72B, Qwen/WorldPM-72B",
        "score",
        ("Qwen2ForRewardModel",),
        activation="relu",
        pooling="hf",
    ),
    Layout(
        "Qwen2ForProcessRewardModel",
        "Qwen/Qwen2.5-Math-PRM-7B and -72B, Qwen/Qwen2.5-Math-7B-PRM800K",
        "score",
        ("Qwen2ForProcessRewardModel",),
        activation="relu",
        pooling="hf",
    ),
    Layout(
        "INF-ORM",
        "infly/INF-ORM-Llama3.1-70B",
        "score",
        ("INFORMForSequenceClassification",),
        activation="relu",
        pooling="hf",
    ),
    Layout(
        "ArmoRM",
        "RLHFlow/ArmoRM-Llama3-8B-v0.1",
        "regression_layer",
        ("LlamaForRewardModelWithGating",),
        gate="a gate on the end of the prompt",
    ),
    Layout(
        "QRM",
        "nicolinho/QRM-Llama3.1-8B-v2, nicolinho/QRM-Gemma-2-27B",
        "regression_layer",
        ("LlamaForRewardModelWithGating", "Gemma2ForQuantileSequenceClassification"),
        gate="means of quantiles, a gate on the end of the prompt",
    ),
    Layout(
        "URM",
        "LxzGordon/URM-LLaMa-3.1-8B",
        "score",
        ("LlamaForSequenceClassificationWithNormal_Weights",),
        gate="means, a gate on the pooled token",
    ),
    Layout("token classifier", "verl, AReaL: AutoModelForTokenClassification with one label", "score"),
    Layout("OpenRLHF", "OpenRLHF, with any value_head_prefix", "value_head"),
)


@dataclass(frozen=True, slots=True)
class FoundHead:
    """The head of a checkpoint: its layers, with the names under which they are stored."""

    layout: str
    layers: tuple[LinearLayer, ...]
    pooling: Pooling
    text: str = ""
    """The form of the text of training; see ``Layout``."""


def find_head(
    source: Path, config: Any, tensors: Mapping[str, TensorInfo], activation: Activation | None = None
) -> FoundHead:
    """Return the head that the tensors outside the body are.

    Args:
        source: the folder, for messages.
        config: transformers' configuration.
        tensors: all stored tensors that are no part of the body.
        activation: the activation between the layers of a head of an unknown layout, from the user.

    Raises:
        CheckpointError: they are no head, more than one, or a deeper one of an unknown layout.
    """
    layers = _layers_of(tensors)
    if layers is None:
        raise CheckpointError(
            f"{source} has no head that is known: outside the body it stores {describe_names(sorted(tensors))}; "
            "`reward-convert --list` prints the layouts that are known."
        )
    module, weights = layers
    layout = _layout_of(module, len(weights), config)
    between = layout.activation if layout else None
    if len(weights) > 1 and between is None:
        between = activation
    if len(weights) > 1 and between is None:
        raise CheckpointError(
            f"The head of {source} has {len(weights)} layers ({describe_names(weights)}) and no known layout, and the "
            "weights do not tell the activation between them: pass --activation with the one of training."
        )
    found = tuple(
        LinearLayer(
            weight,
            bias if (bias := weight.removesuffix("weight") + "bias") in tensors else None,
            "none" if weight == weights[-1] else between or "none",
        )
        for weight in weights
    )
    name = layout.name if layout else "OpenRLHF" if getattr(config, "value_head_prefix", None) else "linear layers"
    pooling = layout.pooling if layout else "last"
    return FoundHead(name, found, pooling, layout.text if layout else "")


def _layers_of(tensors: Mapping[str, TensorInfo]) -> tuple[str, list[str]] | None:
    """Return the module that all tensors belong to, and the names of its weights in order; None if there is none."""
    parsed = {name: LAYER.fullmatch(name) for name in tensors}
    modules = {match["module"] for match in parsed.values() if match}
    weights = [name for name, match in parsed.items() if match and match["kind"] == "weight"]
    biases = [name for name, match in parsed.items() if match and match["kind"] == "bias"]
    without_weight = {name.removesuffix("bias") for name in biases} - {name.removesuffix("weight") for name in weights}
    if len(modules) != 1 or not all(parsed.values()) or not weights or without_weight:
        return None
    return modules.pop(), sorted(weights, key=_index)


def _index(name: str) -> int:
    match = LAYER.fullmatch(name)
    return int(match["index"] or 0) if match else 0


def _layout_of(module: str, num_layers: int, config: Any) -> Layout | None:
    architectures = set(config.architectures or ())
    for layout in LAYOUTS:
        is_deep, is_class = layout.activation is not None, bool(architectures & set(layout.architectures))
        if layout.gate:
            continue
        if layout.module == module and is_deep == (num_layers > 1) and (is_class or not layout.architectures):
            return layout
    return None


def listed() -> Sequence[str]:
    """Return the known layouts as lines for a terminal."""
    named = [layout for layout in PROCESS_LAYOUTS if not layout.architectures]
    width = max(len(name) for name in [*(layout.name for layout in LAYOUTS), *(layout.name for layout in named)])
    lines = [f"{layout.name:{width}}  {layout.module}: {layout.models}" for layout in LAYOUTS]
    return [*lines, *(f"{layout.name:{width}}  --process {layout.name}: {layout.models}" for layout in named)]
