"""Layouts of published models with a gate: K objectives, and a network that weights them by a state of the text.

Tensor names alone tell them apart. What is linear in eval mode (batch normalisation, a mean over quantiles, a matrix
after the objectives) is folded into the neighbouring layer in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.converted_head import HEAD, ConvertedHead, Tensors, stored_layers
from export.stored_model import StoredModel
from service.checkpoints.described_heads import Gate, GatedHead, LinearLayer
from service.checkpoints.reward_description import WeightedSum
from service.errors import CheckpointError

BATCH_NORM_EPS = 1e-5
"""The default of torch's BatchNorm1d, which the layouts use."""

HELPSTEER = ("helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
             "helpsteer-verbosity")  # fmt: skip
OBJECTIVES: Mapping[int, tuple[str, ...]] = {
    5: HELPSTEER,
    19: (
        *HELPSTEER,
        "ultrafeedback-overall_score",
        "ultrafeedback-instruction_following",
        "ultrafeedback-truthfulness",
        "ultrafeedback-honesty",
        "ultrafeedback-helpfulness",
        "beavertails-is_safe",
        "prometheus-score",
        "argilla-overall_quality",
        "argilla-judge_lm",
        "code-complexity",
        "code-style",
        "code-explanation",
        "code-instruction-following",
        "code-readability",
    ),
}
"""Names of the objectives by their number, as the model cards of ArmoRM, QRM and URM list them."""

PATTERNS = {
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
}
"""What stands between prompt and completion, by model type; the gate reads the first of its tokens."""

TEMPERATURES = {"llama": 10.0, "gemma2": 1.0}
"""Temperature of the gate's softmax where the configuration has no ``gating_temperature``, by model type."""

REWARD = "reward"
"""Name of the gated sum, the first output."""

GATING = "gating."
URM_GATE = "weights.fc."


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What the user says of a gate and the source does not hold."""

    pattern: str | None = None
    """The text between prompt and completion; None: that of the model's type."""

    outputs: tuple[str, ...] = ()
    """Names of the objectives; empty: those of the model card."""


def is_gated(names: set[str]) -> bool:
    """Whether tensors outside the body belong to a layout with a gate."""
    return ("regression_layer.weight" in names and any(name.startswith(GATING) for name in names)) or _is_urm(names)


def _is_urm(names: set[str]) -> bool:
    return f"{HEAD}.weight" in names and any(name.startswith(URM_GATE) for name in names)


def gated_head(stored: StoredModel, names: set[str], options: GateOptions) -> ConvertedHead:
    """Return the head of a model with a gate.

    Args:
        stored: the source.
        names: its tensors outside the body; ``is_gated`` is true of them.
        options: from the user.

    Raises:
        CheckpointError: the tensors are not those of a known layout, or the objectives have no known names.
    """
    return _urm(stored, names, options) if _is_urm(names) else _armo(stored, names, options)


def _armo(stored: StoredModel, names: set[str], options: GateOptions) -> ConvertedHead:
    """ArmoRM and QRM: the gate reads the end of the prompt."""
    layers, gate_tensors = _gate_layers(stored, names)
    num_objectives = len(gate_tensors[layers[-1].weight])
    objectives = stored.tensors["regression_layer.weight"]
    transform = stored.tensors.get("reward_transform_matrix")
    num_quantiles, remainder = divmod(len(objectives), num_objectives)
    if remainder or num_quantiles != int(getattr(stored.config, "num_quantiles", None) or num_quantiles):
        raise CheckpointError(
            f"regression_layer.weight of {stored.source} has {len(objectives)} rows, which are not those of "
            f"{num_objectives} objectives, as the gate has."
        )
    tensors: dict[str, Any] = {}
    if num_quantiles > 1:
        objectives, transform = _expected(objectives, num_objectives, transform), None
    if transform is not None:
        tensors[f"{HEAD}.transform"] = transform
    gate, stored_gate = stored_layers(layers, gate_tensors, f"{HEAD}.gate")
    tensors |= {f"{HEAD}.objectives.weight": objectives, **stored_gate}
    scale = float(stored.tensors["gating.logit_scale"].float().flatten()[0])
    rule = Gate(gate, "softmax", _temperature(stored), scale, _token_pattern(stored, options.pattern))
    return ConvertedHead(
        layout="QRM" if num_quantiles > 1 else "ArmoRM",
        head=GatedHead(
            LinearLayer(f"{HEAD}.objectives.weight"), rule, None if transform is None else f"{HEAD}.transform"
        ),
        tensors=tensors,
        sources=tuple(sorted(names)),
        outputs=_outputs(stored, num_objectives, options),
        combine=WeightedSum({REWARD: 1.0}),
        notes=("Each objective is the mean of its quantiles; the quantiles are not served.",)
        if num_quantiles > 1
        else (),
    )


def _urm(stored: StoredModel, names: set[str], options: GateOptions) -> ConvertedHead:
    """URM: two rows per objective, mean and deviation, of which the means are weighted by a gate on the same state."""
    rows = stored.tensors[f"{HEAD}.weight"]
    weights = sorted((name for name in names if name.startswith(URM_GATE) and name.endswith("weight")), key=_index)
    layers = [
        LinearLayer(name, name.removesuffix("weight") + "bias", "none" if name == weights[-1] else "selu")
        for name in weights
    ]
    num_objectives = len(stored.tensors[weights[-1]])
    if len(rows) != 2 * num_objectives or not all(set(layer.tensor_names()) <= names for layer in layers):
        raise CheckpointError(
            f"The head of {stored.source} is not that of URM: {HEAD}.weight has {len(rows)} rows, and the gate "
            f"{num_objectives} weights."
        )
    gate, tensors = stored_layers(layers, stored.tensors, f"{HEAD}.gate")
    return ConvertedHead(
        layout="URM",
        head=GatedHead(LinearLayer(f"{HEAD}.objectives.weight"), Gate(gate, normalization="none")),
        tensors={f"{HEAD}.objectives.weight": rows[::2].contiguous(), **tensors},
        sources=tuple(sorted(names)),
        outputs=_outputs(stored, num_objectives, options),
        combine=WeightedSum({REWARD: 1.0}),
        notes=("Each objective is the mean of its distribution; the deviations are not served.",),
    )


def _outputs(stored: StoredModel, num_objectives: int, options: GateOptions) -> tuple[str, ...]:
    names = options.outputs or OBJECTIVES.get(num_objectives, ())
    if len(names) != num_objectives:
        raise CheckpointError(
            f"{stored.source} has {num_objectives} objectives, and the names of {len(names)} are known: pass "
            "--outputs with their names."
        )
    return (REWARD, *names)


def _index(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _gate_layers(stored: StoredModel, names: set[str]) -> tuple[list[LinearLayer], dict[str, Any]]:
    """Return the linear layers of a gate, with each batch normalisation folded into the layer after it.

    ReLU stands after each layer but the last; a normalisation stands behind the ReLU.
    """
    prefix = f"{GATING}layers."
    indices = sorted({_index(name) for name in names if name.startswith(prefix)})
    layers: list[LinearLayer] = []
    tensors: dict[str, Any] = {}
    pending = None
    for index in indices:
        own = {name.rpartition(".")[2]: stored.tensors[name] for name in names if name.startswith(f"{prefix}{index}.")}
        if "running_mean" in own:
            pending = own
            continue
        weight, bias = own["weight"], own.get("bias")
        if pending is not None:
            weight, bias = _fold(pending, weight, bias)
            pending = None
        layers.append(LinearLayer(f"{index}.weight", None if bias is None else f"{index}.bias", "relu"))
        tensors |= {f"{index}.weight": weight} | ({} if bias is None else {f"{index}.bias": bias})
    if not layers or pending is not None or f"{GATING}logit_scale" not in names:
        raise CheckpointError(f"The gate of {stored.source} is not that of ArmoRM or QRM: its last layer is missing.")
    layers[-1] = LinearLayer(layers[-1].weight, layers[-1].bias)
    return layers, tensors


def _fold(norm: Tensors, weight: Any, bias: Any | None) -> tuple[Any, Any]:
    """Return a linear layer that computes the batch normalisation before it too, in eval mode."""
    scale = norm["weight"].double() / (norm["running_var"].double() + BATCH_NORM_EPS).sqrt()
    shift = norm["bias"].double() - norm["running_mean"].double() * scale
    folded = weight.double() @ shift
    return (weight.double() * scale).float(), (folded if bias is None else folded + bias.double()).float()


def _expected(rows: Any, num_objectives: int, transform: Any | None) -> Any:
    """Return the rows of the expectation of each objective, over its quantiles and after the transform."""
    mean = rows.double().reshape(num_objectives, -1, rows.shape[1]).mean(dim=1)
    return (mean if transform is None else transform.double().T @ mean).float()


def _temperature(stored: StoredModel) -> float:
    known = getattr(stored.config, "gating_temperature", None) or TEMPERATURES.get(stored.config.model_type)
    if known is None:
        raise CheckpointError(
            f"The configuration of {stored.source} has no gating_temperature, by which the gate divides: set it to "
            "that of training."
        )
    return float(known)


def _token_pattern(stored: StoredModel, pattern: str | None) -> tuple[int, ...]:
    """Return the token ids between prompt and completion, by the source's tokenizer."""
    text = pattern or PATTERNS.get(stored.config.model_type)
    if text is None:
        raise CheckpointError(
            f"The gate of {stored.source} reads the state at the end of the prompt, and what stands there is not known "
            f"for {stored.config.model_type}: pass --gate-pattern with the text between prompt and completion."
        )
    tokenizer = stored.tokenizer()
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.convert_ids_to_tokens(ids[0]) not in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()):
        raise CheckpointError(
            f"The tokenizer of {stored.source} has no token for the beginning of {text!r}, where the gate reads: pass "
            "--gate-pattern with the text that the chat template writes between prompt and completion."
        )
    return ids
