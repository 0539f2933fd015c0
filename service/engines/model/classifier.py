"""A scalar-head classifier as transformers loads it, with its body in the requested dtype and its head in fp32.

It defines how a reward is computed from hidden states (pooling, head); the forward paths compute those states. It
validates nothing: the checkpoint is validated before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from service.checkpoints.configuration import read_config
from service.checkpoints.described_heads import ClassifierHead
from service.checkpoints.quantized_weights import read_widened
from service.checkpoints.reward_description import RewardDescription
from service.engines.base import StateTap
from service.engines.linear.inplace_silu import gate_in_place
from service.engines.model.described_head import STATE_HEADS, GatedHeadModule, StateHead, load_head
from service.engines.model.scalar_head import batch_invariant_head, batch_invariant_layers
from service.engines.model.taps import Readout, RecordedStates, blocks_of, record_states
from service.errors import SettingsError
from service.records import TOKEN_TYPE_SHIFT, Pooling
from service.token_pattern import last_occurrence
from service.transformers_logging import transformers_silenced


@dataclass(frozen=True, slots=True)
class Classifier:
    """A loaded classifier."""

    model: Any
    """The transformers model, on its device, in inference mode."""

    plain_attention: str
    """The attention implementation that transformers chose for it."""

    pooling: Pooling
    """Which token's hidden state the head reads."""

    pad_token_id: int | None
    """The pad token, which ``hf`` pooling skips at the end."""

    reads_token_types: bool = False
    """Whether rows may hold token types beside token ids, see ``TokenSequence.row``."""

    outputs: tuple[str, ...] = ("reward",)
    """Names of the numbers that the head gives at a token, in order."""

    @property
    def body(self) -> Any:
        """The transformer below the head: token ids in, hidden states out."""
        return self.model.base_model

    @property
    def state_head(self) -> nn.Linear | StateHead | None:
        """The head on the state of one token, ``score`` in decoder families; None where the head does its own pooling.

        It is one linear layer, or a described head.
        """
        head = getattr(self.model, "score", None)
        return head if isinstance(head, (nn.Linear, *STATE_HEADS)) else None

    @property
    def multiplied_together(self) -> nn.Module:
        """What computes all sequences of a batch together: the body, and a head that does its own pooling.

        A head on the state of one token is computed by ``outputs_of``.
        """
        module: nn.Module = self.model if self.state_head is None else self.body
        return module

    @property
    def gate_pattern(self) -> tuple[int, ...]:
        """Token ids of which a gated head reads the first one; empty where the head reads no other token."""
        head = self.state_head
        return head.token_pattern if isinstance(head, GatedHeadModule) else ()

    @property
    def config(self) -> Any:
        """The text part of the model's configuration."""
        return self.model.config.get_text_config()

    @property
    def architecture(self) -> str:
        """The transformers class of the model."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the body."""
        dtype: torch.dtype = self.body.dtype
        return dtype

    @property
    def is_half_precision(self) -> bool:
        """Whether the body computes in bfloat16 or float16."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def is_on_cpu(self) -> bool:
        """Whether the forward pass runs on the CPU."""
        return self.device.type == "cpu"

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers of the body, first to last."""
        return blocks_of(self.body, self.config.num_hidden_layers)

    def token_tensor(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return token ids of equal length as int64 [rows, tokens] on the model's device."""
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def inputs_of(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return rows of equal length as inputs of the model: token ids, and token types where it reads them."""
        typed = self.token_tensor(rows)
        if not self.reads_token_types:
            return {"input_ids": typed}
        return {"input_ids": typed & ((1 << TOKEN_TYPE_SHIFT) - 1), "token_type_ids": typed >> TOKEN_TYPE_SHIFT}

    def pooled_position(self, ids: Sequence[int]) -> int:
        """Return the position in ``ids`` whose hidden state the head reads."""
        return pooled_position(ids, self.pooling, self.pad_token_id)

    def head_position(self, ids: Sequence[int]) -> int:
        """Return the position in ``ids`` whose state is the head's input; an encoder's own head reads the first."""
        if self.state_head is None:
            return 0
        return self.pooled_position([entry & ((1 << TOKEN_TYPE_SHIFT) - 1) for entry in ids])

    def gate_position(self, ids: Sequence[int]) -> int:
        """Return the position in ``ids`` whose state the gate of the head reads.

        Raises:
            ValueError: the tokens between prompt and completion are not there, so there is no such state.
        """
        return gate_position(ids, self.gate_pattern)

    def recording(
        self, taps: tuple[StateTap, ...], readouts: Sequence[Readout]
    ) -> AbstractContextManager[RecordedStates]:
        """Record states of the pass that runs while the context is open; see ``record_states``."""
        return record_states(self.body, self.config.num_hidden_layers, taps, readouts)

    def outputs_of(self, states: torch.Tensor, gate_states: torch.Tensor | None = None) -> torch.Tensor:
        """Run the head on states [rows, hidden]; float32 [rows, outputs], on the device.

        The order of additions of a matrix product depends on its number of rows, so on a CPU the states are multiplied
        one by one. On a GPU, where each product would be a kernel launch, ``batch_invariant_head`` multiplies all at
        once.

        Args:
            states: of the tokens that are read.
            gate_states: of the token that the gate reads, one for each of them; None where there is no gate pattern.
        """
        head = self.state_head
        if head is None:
            raise TypeError(f"The head of {self.architecture} does its own pooling")
        if isinstance(head, nn.Linear):
            if not self.is_on_cpu:
                return batch_invariant_head(states, head.weight, head.bias)
            return torch.cat([head(state[None]) for state in states])
        if not self.is_on_cpu:
            outputs: torch.Tensor = head(states, gate_states, batch_invariant_layers)
            return outputs
        if gate_states is None:
            return torch.cat([head(state[None]) for state in states])
        return torch.cat([head(state[None], gate[None]) for state, gate in zip(states, gate_states, strict=True)])


def pooled_position(ids: Sequence[int], pooling: Pooling, pad_token_id: int | None) -> int:
    """Return the position whose hidden state the head reads.

    ``hf`` is the rule of transformers' ``GenericForSequenceClassification``: the rightmost token that is not the pad
    token, independent of the attention mask; the first position when all are pad, the last when no pad token is
    defined.

    Raises:
        ValueError: there are no tokens, hence no state and no reward.
    """
    if not ids:
        raise ValueError("A sequence without tokens has no reward")
    last = len(ids) - 1
    if pooling == "last" or pad_token_id is None:
        return last
    return next((position for position in range(last, -1, -1) if ids[position] != pad_token_id), 0)


def gate_position(ids: Sequence[int], pattern: Sequence[int]) -> int:
    """Return the position whose state a gate reads: where the last occurrence of its token pattern begins.

    Raises:
        ValueError: the pattern does not occur, so there is no such state.
    """
    position = last_occurrence(ids, pattern)
    if position is None:
        raise ValueError("A sequence without the tokens that the gate reads has no reward")
    return position


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype in which the checkpoint was saved; float32 where its configuration has none."""
    name = str(config.dtype or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_classifier(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    pooling: Pooling,
    pad_token_id: int | None,
    description: RewardDescription | None = None,
) -> Classifier:
    """Load a checkpoint folder for inference.

    The head's weights are those of the checkpoint, bit for bit where it stores fp32, and are never rounded to the
    dtype of the body; hidden states are cast to fp32 before it. Quantized weights are widened to the dtype of the body,
    those of the head to fp32. A described head takes the place of the classifier's.

    Args:
        folder: a validated checkpoint.
        dtype: of the body.
        device: where the model runs.
        pooling: the resolved pooling.
        pad_token_id: the resolved pad token.
        description: the resolved description; None: the head is the classifier's, with one output.

    Raises:
        SettingsError: another pooling is requested of a model whose own head pools.
    """
    config = read_config(folder)
    with torch.device("meta"):
        outline = AutoModelForSequenceClassification.from_config(config)
    head_names = [name for name, _ in outline.named_children() if name != outline.base_model_prefix]

    head_prefixes = tuple(f"{name}." for name in head_names)

    # Fused attention does not support soft caps, and some versions of transformers choose it for such models anyway.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    with transformers_silenced(), _loaded_in_fp32(type(outline), head_names):
        widened = read_widened(folder, lambda name: torch.float32 if name.startswith(head_prefixes) else dtype)
        model = type(outline).from_pretrained(
            folder if widened is None else None,
            config=config,
            state_dict=widened,
            dtype=dtype,
            attn_implementation="eager" if capped else None,
            local_files_only=True,
        )
    for name in head_names:
        getattr(model, name).register_forward_pre_hook(_cast_to_fp32)
    if description is not None and not isinstance(description.head, ClassifierHead):
        model.score = load_head(folder, description.head)
    model.config.get_text_config().pad_token_id = pad_token_id
    model.requires_grad_(requires_grad=False).eval().to(device)
    gate_in_place(model.base_model)

    classifier = Classifier(
        model,
        model.config._attn_implementation,  # noqa: SLF001 - no public name
        pooling,
        pad_token_id,
        outputs=("reward",) if description is None else description.outputs,
    )
    if pooling != "hf" and classifier.state_head is None:
        raise SettingsError(
            f"model.pooling is {pooling}, but {classifier.architecture} pools in its own head: leave the setting out"
        )
    return classifier


@contextmanager
def _loaded_in_fp32(model_class: Any, names: Sequence[str]) -> Iterator[None]:
    """Let transformers load the named top-level modules of a class in fp32, independent of the dtype of the rest."""
    declared = model_class._keep_in_fp32_modules_strict  # noqa: SLF001 - as transformers' own models declare it
    model_class._keep_in_fp32_modules_strict = {*(declared or ()), *(rf"^{name}\." for name in names)}  # noqa: SLF001
    try:
        yield
    finally:
        model_class._keep_in_fp32_modules_strict = declared  # noqa: SLF001


def _cast_to_fp32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in inputs
    )
