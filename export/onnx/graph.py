"""Exports a classifier as an ONNX graph from token ids to rewards and pooled hidden states, for any batch and length.

The graph is traced from the model's transformers code, and its numbers are unchanged. Quantization and comparison are
in the other modules of this package.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.checkpoints.bundle import GRAPH_FILE
from service.engines.model.classifier import Classifier
from service.engines.onnx import GATE_INPUT, INPUTS, REWARD, STATES
from service.engines.rewiring import rewire
from service.errors import CheckpointError
from service.records import StateTap
from service.transformers_logging import transformers_silenced

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding, which ONNX Runtime runs as single operators."""

INLINE_LIMIT_BYTES = 1_500_000_000
"""Larger weights are stored in a separate file, because a protocol buffer holds at most 2 GB."""


class RewardGraph(nn.Module):
    """The exported module: the classifier with the pooled position as an input and the tapped states as an output.

    Args:
        classifier: a classifier in inference mode; its head remains in fp32.
        taps: where states are read, in the order of the output.
    """

    def __init__(self, classifier: Classifier, taps: Sequence[StateTap]) -> None:
        super().__init__()
        self.model = classifier.model
        self._has_state_head = classifier.state_head is not None
        self._num_outputs = len(classifier.outputs)
        # Rotary embeddings need positions per sequence. Learned position embeddings may start at another number than 0.
        has_rope = bool(getattr(classifier.config, "rope_parameters", None))
        self._takes_positions = has_rope and "position_ids" in classifier.body.forward.__annotations__
        self._taps = tuple(taps)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        pooled_position: torch.Tensor,
        mean_weights: torch.Tensor,
        gate_position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs of the head and states fp32 [batch, taps, hidden].

        The outputs are fp32 [batch, outputs]; of a head with one output fp32 [batch].

        Args:
            input_ids: int64 [batch, length], padded on the right.
            attention_mask: int64 [batch, length], 1 for tokens and 0 for padding.
            position_ids: int64 [batch, length], counted from 0.
            pooled_position: int64 [batch], the position that a head on one state and ``last`` taps read.
            mean_weights: fp32 [batch, length], the weight of each token in ``mean`` taps.
            gate_position: int64 [batch], the position that the gate of a gated head reads; None for other heads.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._takes_positions:
            inputs["position_ids"] = position_ids
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        output_options = {"output_hidden_states": bool(self._taps)}
        if self._has_state_head:
            output = self.model.base_model(**inputs, **output_options, use_cache=False)
            pooled = output.last_hidden_state[rows, pooled_position]
            if gate_position is None:
                outputs = self.model.score(pooled).float()
            else:
                outputs = self.model.score(pooled, output.last_hidden_state[rows, gate_position])
        else:
            output = self.model(**inputs, **output_options)
            outputs = output.logits.float()
        states = self._read_states(output.hidden_states, rows, pooled_position, mean_weights)
        return (outputs[:, 0] if self._num_outputs == 1 else outputs), states

    def _read_states(
        self, layers: Any, rows: torch.Tensor, pooled_position: torch.Tensor, mean_weights: torch.Tensor
    ) -> torch.Tensor:
        if not self._taps:
            return mean_weights.new_zeros((mean_weights.shape[0], 0, self.model.config.get_text_config().hidden_size))
        read = []
        for tap in self._taps:
            states = layers[tap.layer]
            if tap.pooling == "last":
                read.append(states[rows, pooled_position].float())
            else:
                read.append((mean_weights[:, None, :] @ states.float())[:, 0])
        return torch.stack(read, dim=1)


def write_graph(classifier: Classifier, taps: Sequence[StateTap], folder: Path) -> None:
    """Trace the classifier and write its graph into the folder.

    Raises:
        CheckpointError: torch cannot trace this architecture.
    """
    rewire(classifier, classifier.plain_attention)
    try:
        with torch.inference_mode(), _quiet():
            program = torch.onnx.export(
                RewardGraph(classifier, taps).eval(),
                _example(classifier),
                dynamo=True,
                opset_version=OPSET,
                input_names=[*INPUTS, *([GATE_INPUT] if classifier.gate_pattern else [])],
                output_names=[REWARD, STATES],
                dynamic_shapes=_dynamic_shapes(classifier),
                verbose=False,
            )
    except Exception as error:  # the tracer raises anything, depending on the model's code
        raise CheckpointError(
            f"torch cannot export {classifier.architecture} to ONNX ({type(error).__name__}): "
            "serve the checkpoint with the torch engine."
        ) from error
    if program is None:
        raise TypeError("torch.onnx.export wrote a file instead of returning its program")
    _clear_shapes(program)
    program.save(folder / GRAPH_FILE, external_data=_num_bytes(classifier) > INLINE_LIMIT_BYTES)


def _example(classifier: Classifier) -> tuple[torch.Tensor, ...]:
    """Return inputs of three sequences with different lengths; dimensions of 1 would become constants."""
    lengths, longest = torch.tensor([12, 9, 5]), 12
    columns = torch.arange(longest)
    mask = (columns < lengths[:, None]).long()
    ids = (7 * columns + torch.arange(3)[:, None]) % classifier.config.vocab_size
    inputs = ids, mask, columns.expand(3, -1).contiguous(), lengths - 1, mask / lengths[:, None]
    return (*inputs, lengths // 2) if classifier.gate_pattern else inputs


def _dynamic_shapes(classifier: Classifier) -> tuple[dict[int, Any], ...]:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    matrix, vector = {0: batch, 1: length}, {0: batch}
    shapes = matrix, matrix, matrix, vector, matrix
    return (*shapes, vector) if classifier.gate_pattern else shapes


def _num_bytes(classifier: Classifier) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in classifier.model.parameters())


def _clear_shapes(program: Any) -> None:
    """Remove intermediate shapes, because the exporter folds transposed weights without updating their shapes."""
    for node in program.model.graph:
        for output in node.outputs:
            if output.name not in {REWARD, STATES}:
                output.shape = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about missing optional packages and merged axis names."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with transformers_silenced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
