"""How stored tensors fit the classifier of an architecture: which are missing, of another shape, or not used.

The comparison is transformers' own loading code, run on the meta device. So renamed, fused and tied weights are treated
as they will be when the model is loaded, and no weight is read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.records import PLAIN_INPUTS, ModelInputs
from service.transformers_logging import transformers_silenced

UNUSED_HEAD = re.compile(
    r"(.+\.)?(lm_head|embed_out|cls|predictions|(lm|mask|generator|discriminator)_predictions|vocab_\w+|pooler|mtp)\."
)
"""Names of the tensors of other heads on the same body, which no scalar head reads: those of the language model, of
masked tokens, of the next sentence, and the pooler of encoders whose classifier does not read it."""

UNUSED_BUFFER = re.compile(r"(.+\.)?(inv_freq|cos_cached|sin_cached|position_ids|token_type_ids|masked_bias|version)")
"""Names of buffers that older versions of transformers stored, and that are computed from the configuration."""

CAUSAL_MASK = re.compile(r"(.+\.)?(attn|attention|self_attn|self_attention)(\.\w+)?\.bias")
"""Names under which older versions of transformers stored the causal mask, which has the shape [1, 1, n, n]."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The result of assigning stored tensors to the parameters of a classifier with one label."""

    architecture: str
    """Name of transformers' classifier class."""

    embedding_size: int
    """Rows of the input embedding."""

    max_positions: int | None
    """Longest input in tokens; None where the architecture has no limit."""

    head: tuple[str, ...]
    """Names of the parameters outside the body."""

    body_prefix: str
    """What the names of the body's parameters begin with, such as ``model.``."""

    embedding: str
    """Name of the input embedding's weight."""

    missing_head: tuple[str, ...] = ()
    """Parameters of the head that no stored tensor provides."""

    missing_body: tuple[str, ...] = ()
    """Parameters of the body that no stored tensor provides."""

    mismatched_head: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Parameters of the head whose stored tensor has another shape: (stored shape, required shape) by name."""

    mismatched_body: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """The same for the body."""

    inputs: ModelInputs = PLAIN_INPUTS
    """What the classifier reads."""

    unused: frozenset[str] = frozenset()
    """Names of the stored tensors that the classifier has no parameter for."""

    unplaced: tuple[str, ...] = ()
    """Those of them that may belong to the computation of a reward; the others are known not to change it."""


def has_classifier(config: Any) -> bool:
    """Whether transformers has a sequence classifier for this configuration, and it is not an encoder-decoder."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not config.is_encoder_decoder


def fit_classifier(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Fit:
    """Assign tensors of these shapes to the parameters of the configuration's classifier.

    Args:
        config: transformers' configuration, with ``num_labels`` 1; it is not changed.
        shapes: shapes of the stored tensors, by name.
    """
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    with transformers_silenced():
        model, report = architecture.from_pretrained(
            None,
            config=config,
            state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    def in_body(name: str) -> bool:
        return name.startswith(f"{model.base_model_prefix}.")

    embedding = model.get_input_embeddings().weight
    missing, unused = sorted(report["missing_keys"]), report["unexpected_keys"]
    mismatched = {name: (tuple(stored), tuple(required)) for name, stored, required in report["mismatched_keys"]}
    return Fit(
        architecture=architecture.__name__,
        embedding_size=embedding.shape[0],
        max_positions=max_positions(model),
        body_prefix=f"{model.base_model_prefix}.",
        embedding=next(name for name, weight in model.named_parameters() if weight is embedding),
        head=tuple(name for name, _ in model.named_parameters() if not in_body(name)),
        missing_head=tuple(name for name in missing if not in_body(name)),
        missing_body=tuple(name for name in missing if in_body(name)),
        mismatched_head={name: shapes for name, shapes in mismatched.items() if not in_body(name)},
        mismatched_body={name: shapes for name, shapes in mismatched.items() if in_body(name)},
        inputs=inputs_of(model),
        unused=frozenset(unused),
        unplaced=tuple(sorted(name for name in unused if not _is_harmless(name, shapes.get(name, ())))),
    )


def _is_harmless(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an unused tensor belongs to another head, or is a buffer that transformers computes itself."""
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(UNUSED_HEAD.match(name) or UNUSED_BUFFER.fullmatch(name) or (is_mask and CAUSAL_MASK.fullmatch(name)))


def inputs_of(model: Any) -> ModelInputs:
    """Return what a classifier of transformers reads."""
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    return ModelInputs(is_encoder="score" not in head, num_token_types=_num_token_types(model))


def _num_token_types(model: Any) -> int:
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return 0
    # Families without the entry (GPT-2) take the embeddings of token types from those of the vocabulary.
    return int(getattr(model.config, "type_vocab_size", model.get_input_embeddings().weight.shape[0]))


def max_positions(model: Any) -> int | None:
    """Return the largest number of tokens that the model has positions for; None: no limit."""
    from torch import nn

    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    if positions is None or positions <= 0:
        return None
    for name, module in model.named_modules():
        # RoBERTa's family numbers positions from padding_idx + 1, so that many rows of its table are never used.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(positions) - module.padding_idx - 1
    return int(positions)
