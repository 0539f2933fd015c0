"""Hidden states, read at taps while a forward pass runs and pooled immediately, so that no layer's states are retained.

Forward hooks between the model's blocks read the states and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from service.engines.base import StatePooling, StateTap
from service.engines.devices.staging import copy_to_device
from service.errors import SettingsError
from service.scheduling.prefix_tree import TokenSpan


@dataclass(frozen=True, slots=True)
class StateQuery:
    """Which states of a pass are requested: those at all taps, for each reading."""

    taps: tuple[StateTap, ...]
    """Where to read."""

    readings: tuple[tuple[int, int], ...]
    """For each reading the index of a sequence of the pass, and its first token that ``mean`` includes; beyond its end,
    all tokens are included."""


@dataclass(frozen=True, slots=True)
class Readout:
    """The position of a reading in hidden states [rows, positions, hidden]."""

    row: int
    """The row of the batch dimension."""

    last: int
    """The position that ``last`` pooling reads."""

    spans: tuple[TokenSpan, ...]
    """The ranges of positions that ``mean`` pooling includes."""


@dataclass(slots=True)
class RecordedStates:
    """The pooled states of one pass, recorded tap by tap."""

    taps: tuple[StateTap, ...]
    """Where they are read."""

    by_tap: dict[StateTap, torch.Tensor] = field(default_factory=dict)
    """Float32 [readouts, hidden] of each tap that the pass has reached."""

    def stacked(self) -> torch.Tensor | None:
        """Return float32 [readouts, taps, hidden] on the device; None without taps."""
        return torch.stack([self.by_tap[tap] for tap in self.taps], dim=1) if self.taps else None


@contextmanager
def record_states(
    body: nn.Module, num_blocks: int, taps: tuple[StateTap, ...], readouts: Sequence[Readout]
) -> Iterator[RecordedStates]:
    """Record the states at the taps of the pass that runs while the context is open.

    Args:
        body: the transformer below the head.
        num_blocks: its depth.
        taps: where to read; with none, nothing is hooked.
        readouts: what to pool, in the hidden states of this pass.
    """
    recorded = RecordedStates(taps)

    def read(layer: int, states: torch.Tensor) -> None:
        for tap in taps:
            if tap.layer == layer:
                recorded.by_tap[tap] = pool(states, readouts, tap.pooling)

    handles = [_hook_layer(body, num_blocks, layer, read) for layer in dict.fromkeys(tap.layer for tap in taps)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def pool(states: torch.Tensor, readouts: Sequence[Readout], pooling: StatePooling) -> torch.Tensor:
    """Return float32 [readouts, hidden]: the state at each readout's last position, or the mean over its spans."""
    if pooling == "last":
        indices = torch.tensor([readout.row * states.shape[1] + readout.last for readout in readouts])
        return states.flatten(0, 1).index_select(0, copy_to_device(indices, states.device)).float()
    means = []
    for readout in readouts:
        parts = [states[readout.row, begin:end] for begin, end in readout.spans]
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
        means.append(tokens.mean(dim=0, dtype=torch.float32))
    return torch.stack(means)


def check_taps(body: nn.Module, num_blocks: int, taps: Sequence[StateTap]) -> None:
    """Verify that every tap can be read.

    Raises:
        SettingsError: the model has no such layer, or its blocks cannot be found.
    """
    for tap in taps:
        if not 0 <= tap.layer <= num_blocks:
            raise SettingsError(f"The model has {num_blocks} blocks: no states can be read at layer {tap.layer}")
    if taps:
        blocks_of(body, num_blocks)


def _hook_layer(body: nn.Module, num_blocks: int, layer: int, read: Any) -> Any:
    """Hook the states after ``layer`` blocks: the next block's input, or the body's output after its final norm."""
    if layer == num_blocks:
        return body.register_forward_hook(lambda _module, _inputs, output: read(layer, output[0]))

    def read_input(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        read(layer, inputs[0] if inputs else named["hidden_states"])

    return blocks_of(body, num_blocks)[layer].register_forward_pre_hook(read_input, with_kwargs=True)


def blocks_of(body: nn.Module, num_blocks: int) -> nn.ModuleList:
    """Return the list of a model's blocks.

    Raises:
        SettingsError: the model has no module list of that length.
    """
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks:
            return module
    raise SettingsError(
        f"{type(body).__name__} has no module list of its {num_blocks} blocks: no states can be read there"
    )
