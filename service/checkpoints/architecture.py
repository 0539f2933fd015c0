"""What the classifier of an architecture needs, beside what a checkpoint stores: which tensors fit, lack or remain.

It is transformers' own loading, run on the meta device: renames, fused and tied weights are respected as they will be
in earnest, and not one weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.transformers_logging import transformers_silenced


@dataclass(frozen=True, slots=True)
class Fit:
    """The outcome of laying stored tensors into a classifier of one label.

    ``missing_head`` and ``missing_body`` name parameters that no stored tensor fills. ``mismatched_head`` and
    ``mismatched_body`` give (stored shape, needed shape). ``unplaced`` names stored tensors that nothing needs.
    ``head`` names the parameters outside the body. ``max_positions`` is None where the architecture has no limit.
    """

    architecture: str
    embedding_size: int
    max_positions: int | None
    head: tuple[str, ...]
    missing_head: tuple[str, ...] = ()
    missing_body: tuple[str, ...] = ()
    mismatched_head: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    mismatched_body: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unplaced: frozenset[str] = frozenset()


def has_classifier(config: Any) -> bool:
    """Tell whether transformers has a sequence classifier for this configuration, and one that writes no text."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not config.is_encoder_decoder


def fit_classifier(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Fit:
    """Lay tensors of these shapes into the classifier of the configuration, which must say ``num_labels`` 1."""
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

    missing = sorted(report["missing_keys"])
    mismatched = {name: (tuple(stored), tuple(needed)) for name, stored, needed in report["mismatched_keys"]}
    return Fit(
        architecture=architecture.__name__,
        embedding_size=model.get_input_embeddings().weight.shape[0],
        max_positions=_max_positions(model),
        head=tuple(name for name, _ in model.named_parameters() if not in_body(name)),
        missing_head=tuple(name for name in missing if not in_body(name)),
        missing_body=tuple(name for name in missing if in_body(name)),
        mismatched_head={name: shapes for name, shapes in mismatched.items() if not in_body(name)},
        mismatched_body={name: shapes for name, shapes in mismatched.items() if in_body(name)},
        unplaced=frozenset(report["unexpected_keys"]),
    )


def _max_positions(model: Any) -> int | None:
    from torch import nn

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from behind the padding index, so its table has as many rows to spare.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(positions) - module.padding_idx - 1
    return int(positions)
